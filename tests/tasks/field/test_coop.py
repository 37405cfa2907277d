"""CoOp's layout, as X-TAIL and the second protocol of MTIL have it."""

import json
from collections import Counter

import pytest
from tasks.field import made

from keeplora.methods.settings import ConfigError
from keeplora.tasks.field import image_benchmark, read_image_set, read_images
from keeplora.tasks.field.coop import few_shot

X_TAIL = made.small(image_benchmark("x-tail"))
COOP = {  # RAIL's folders
    "caltech101": "caltech-101", "dtd": "dtd", "eurosat": "eurosat", "flowers": "oxford_flowers",
    "food101": "food-101", "oxford_pets": "oxford_pets", "stanford_cars": "stanford_cars", "sun397": "sun397",
}  # fmt: skip
LADA = {
    "caltech101": "Caltech101", "dtd": "DTD", "eurosat": "EuroSAT", "flowers": "Flowers",
    "food101": "Food", "oxford_pets": "Pets", "stanford_cars": "StanfordCars", "sun397": "Sun397",
}  # fmt: skip


def fill(root, folders, aircraft, mnist):
    for name, folder in folders.items():
        spec = X_TAIL.sets[name]
        made.zhou(root / folder, spec.split, spec.images)
        if name == "stanford_cars":  # its paths begin with these
            for part in ("cars_train", "cars_test"):
                (root / folder / part).mkdir()
    made.text(root / aircraft / "variants.txt", "707-320\nA_340\n")
    for part, rows in (("train", "1 707-320\n2 A_340\n"), ("val", "1 A_340\n"), ("test", "2 A_340\n")):
        made.text(root / aircraft / f"images_variant_{part}.txt", rows)
    for name in (1, 2):
        made.image(root / aircraft / f"images/{name}.jpg")
    made.mnist(root / mnist, train=20)
    return root


@pytest.mark.parametrize(
    ("folders", "aircraft", "mnist"),
    [(COOP, "fgvc_aircraft", "mnist/MNIST/raw"), (LADA, "Aircraft", "MNIST/MNIST/raw")],
)
def test_x_tail_in_both_spellings(tmp_path, folders, aircraft, mnist):
    sets = {each.name: each for each in read_images(fill(tmp_path, folders, aircraft, mnist), X_TAIL, "II")}
    assert list(sets) == list(X_TAIL.orders["II"])
    assert sets["dtd"].classes == ("c 0", "c 1")
    assert sets["eurosat"].classes == ("c 0 satellite location", "c 1 satellite location")
    assert sets["mnist"].classes[3] == 'number: "3 - three"'
    assert sets["aircraft"].classes == ("707-320", "A 340")
    for each in sets.values():
        assert set(Counter(label for _, label in each.train).values()) == {16}
        assert each.train[0][0].open().mode == "RGB"
        assert any("16 training images of each class, drawn with seed 42" in note for note in each.notes)
    assert (len(sets["sun397"].validation), len(sets["sun397"].test)) == (2, 4)
    whole = read_image_set(tmp_path, X_TAIL, "sun397", shots=0)
    assert len(whole.train) == 23
    assert any("23 training images, not the published 15880" in note for note in whole.notes)


def test_16_shots_repeat_only_where_there_are_fewer():
    items = [(f"a{i}", 0) for i in range(16)] + [("b0", 1), ("b1", 1)] + [(f"c{i}", 2) for i in range(40)]
    drawn = few_shot(items, 16, seed=42)
    groups = {label: [name for name, each in drawn if each == label] for label in range(3)}
    assert sorted(groups[0]) == sorted(f"a{i}" for i in range(16))
    assert len(groups[1]) == 16
    assert set(groups[1]) == {"b0", "b1"}
    assert len(set(groups[2])) == 16
    assert few_shot(items, 16, seed=42) == drawn
    assert few_shot(items, 16, seed=43) != drawn
    with pytest.raises(ConfigError, match="shots must be at least 1, or 0 for all images, got -1"):
        few_shot(items, -1, seed=42)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop("val"), "must have lists train, val and test"),
        (lambda rows: rows["train"].append(["../x.jpg", 0, "c_0"]), r"rows of a path inside the folder, .*\.\./x\.jpg"),
        (lambda rows: rows["train"].append(["/x.jpg", 0, "c_0"]), "rows of a path inside the folder"),
        (lambda rows: rows["train"].append(["x.jpg", 0, "c_1"]), "a label and its one name"),
        (lambda rows: rows["train"].append(["x.jpg", "0"]), "rows of a path"),
        (lambda rows: rows["train"].append(["x.jpg", 5, "c_5"]), r"from 0 without a gap, got \[0, 1, 5\]"),
        (lambda rows: rows["test"].append(["c_0/gone.jpg", 0, "c_0"]), r"got none at .*gone.jpg \(1 of \d+ missing\)"),
    ],
)
def test_a_wrong_split_is_refused(tmp_path, change, message):
    spec = X_TAIL.sets["dtd"]
    made.zhou(tmp_path / "dtd", spec.split, spec.images)
    path = tmp_path / "dtd" / spec.split
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=message):
        read_image_set(tmp_path, X_TAIL, "dtd")


def test_a_missing_split_is_named_with_its_place(tmp_path):
    (tmp_path / "DTD/images").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"dtd: DTD has no split_zhou_DescribableTextures.json"):
        read_image_set(tmp_path, X_TAIL, "dtd")
    with pytest.raises(ConfigError, match=r"sun397: no folder sun397 or Sun397 or SUN397"):
        read_image_set(tmp_path, X_TAIL, "sun397")
    with pytest.raises(ConfigError, match=r"name must be one of aircraft, .* got 'cifar100'"):
        read_image_set(tmp_path, X_TAIL, "cifar100")


def test_cifar100_of_the_second_protocol(tmp_path):
    made.cifar100(tmp_path / "cifar100")
    one = read_image_set(tmp_path, made.small(image_benchmark("mtil-coop")), "cifar100")
    assert one.classes == ("aquarium fish", "apple")
    assert len(one.train) == 4
