"""Image folders and data sets as users have them: read as they are, or refused with what is wrong with them."""

import pytest
from PIL import Image
from tasks.own.places import picture, write_classes

from keeplora.methods.settings import ConfigError
from keeplora.tasks.own import DataSettings, Faults, ModelSource, OwnTasks, TaskSource
from keeplora.tasks.own.images import read_images
from keeplora.tasks.own.splits import split_off


def own(base, *tasks, **data):
    return OwnTasks(ModelSource(transformers="unused"), tasks, DataSettings(**data), base=str(base))


def read(base, task, **data):
    settings = own(base, task, **data)
    faults = Faults(settings.data)
    return read_images(task, settings, faults), faults


def test_class_folders_are_classes_in_order_of_their_names(tmp_path):
    write_classes(tmp_path / "a", 3)
    (tmp_path / "a" / ".cache").mkdir()
    (tmp_path / "a" / "red" / "deeper").mkdir()
    picture("red", 9).save(tmp_path / "a" / "red" / "deeper" / "z.JPG")
    found, faults = read(tmp_path, TaskSource("a", folder="a"))
    assert found.classes == ("blue", "green", "red")
    assert [item.name for item in found.items][-2:] == ["red/02.png", "red/deeper/z.JPG"]
    assert found.labels == (0, 0, 0, 1, 1, 1, 2, 2, 2, 2)
    assert found.places == {"train": list(range(10))}
    assert not faults.found


def test_folders_called_train_and_test_are_splits(tmp_path):
    write_classes(tmp_path / "a" / "train", 2)
    write_classes(tmp_path / "a" / "val", 1)
    write_classes(tmp_path / "a" / "Test", 1, names=("red", "blue"))
    found, _ = read(tmp_path, TaskSource("a", folder="a"))
    assert {split: len(places) for split, places in found.places.items()} == {"train": 6, "validation": 3, "test": 2}
    assert [found.items[place].name for place in found.places["test"]] == ["Test/blue/00.png", "Test/red/00.png"]


def test_a_class_that_is_called_test_is_a_class(tmp_path):
    write_classes(tmp_path / "a", 1)
    (tmp_path / "a" / "red").rename(tmp_path / "a" / "test")
    found, _ = read(tmp_path, TaskSource("a", folder="a"))
    assert found.classes == ("blue", "green", "test")


def test_what_stands_beside_the_splits_is_refused(tmp_path):
    write_classes(tmp_path / "a" / "train", 1)
    write_classes(tmp_path / "a" / "extra", 1)
    with pytest.raises(ConfigError, match=r"beside 'train'.*'a' must hold splits alone, got extra"):
        read(tmp_path, TaskSource("a", folder="a"))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"folder of task 'a' must be a folder, got '.*/nowhere'"):
        read(tmp_path, TaskSource("a", folder="nowhere"))


def test_one_class_is_none(tmp_path):
    write_classes(tmp_path / "a", 1, names=("red",))
    with pytest.raises(ConfigError, match="at least two classes, got red"):
        read(tmp_path, TaskSource("a", folder="a"))


def test_other_files_and_empty_classes_are_counted_and_refused_at_once(tmp_path):
    write_classes(tmp_path / "a", 1)
    (tmp_path / "a" / "white").mkdir()
    (tmp_path / "a" / "red" / "notes.txt").write_text("x")
    (tmp_path / "a" / "red" / "Thumbs.db").write_text("x")
    _, faults = read(tmp_path, TaskSource("a", folder="a"))
    with pytest.raises(ConfigError) as told:
        faults.refuse()
    text = str(told.value)
    assert "1 are no images in a: red/notes.txt" in text
    assert "1 are class folders without an image in a: white (in train)" in text
    assert 'not_image = "skip"' in text
    assert 'empty_class = "skip"' in text


def test_empty_classes_are_left_out_where_the_file_says_so(tmp_path):
    write_classes(tmp_path / "a" / "train", 1, names=("red", "blue"))
    write_classes(tmp_path / "a" / "test", 1)
    found, faults = read(tmp_path, TaskSource("a", folder="a"), faults={"empty_class": "skip"})
    faults.refuse()
    assert found.classes == ("blue", "red")
    assert len(found.places["test"]) == 2  # the green one is of no class that can be learned
    assert faults.notes() == [
        "1 are class folders without an image in a: train/green (in train): left out, as [data.faults] says"
    ]


def test_data_sets_are_read_by_datasets(tmp_path):
    import datasets

    names = ["red", "green", "blue"]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names), "id": datasets.Value("int64")}
    )
    rows = {
        "image": [picture(names[i % 3], i) for i in range(6)],
        "label": [i % 3 for i in range(6)],
        "id": list(range(6)),
    }
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.to_parquet(tmp_path / "rows.parquet")
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(tmp_path / "saved")
    found, _ = read(tmp_path, TaskSource("a", dataset="rows.parquet"))
    assert found.classes == ("red", "green", "blue")  # in the data set's order
    assert found.labels == (0, 1, 2, 0, 1, 2)
    saved, _ = read(tmp_path, TaskSource("a", dataset="saved"))
    assert {split: len(places) for split, places in saved.places.items()} == {"train": 6, "test": 1}
    assert saved.items[0].read() == found.items[0].read()
    with pytest.raises(ConfigError, match="image_column of task 'a' must be a column of saved, got 'img'"):
        read(tmp_path, TaskSource("a", dataset="saved", image_column="img"))


def test_a_table_of_paths_is_read_from_its_own_folder(tmp_path):
    write_classes(tmp_path / "d", 2)
    lines = [f"{name}/{number:02}.png,{name}" for name in ("red", "blue") for number in range(2)]
    (tmp_path / "d" / "all.csv").write_text("\n".join(["file,kind", *lines]) + "\n")
    found, _ = read(tmp_path, TaskSource("a", dataset="d/all.csv", image_column="file", label_column="kind"))
    assert found.classes == ("blue", "red")
    assert found.items[0].read() == (tmp_path / "d" / "red" / "00.png").read_bytes()


def test_splits_take_a_share_of_every_class_whatever_the_others_are():
    names = ["cat"] * 10 + ["dog"] * 5 + ["owl"]
    stay, off = split_off(names, 0.2, seed=3)
    assert sorted([*stay, *off]) == list(range(16))
    assert [names[place] for place in off] == ["cat", "cat", "dog"]
    assert split_off(names[:10], 0.2, seed=3)[1] == [place for place in off if place < 10]
    assert split_off(names, 0.2, seed=4)[1] != off
    assert split_off(names, 0.0, seed=3)[1] == []


def test_grey_and_transparent_images_are_told_by_kind(tmp_path):
    from keeplora.tasks.own.pixels import check_image

    Image.new("L", (3, 3)).save(tmp_path / "g.png")
    assert check_image((tmp_path / "g.png").read_bytes()) == [("grey", "mode L")]


def table(path, names, labels, colours=None):
    import datasets

    kind = datasets.ClassLabel(names=names) if names else datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    pictures = [None if colour is None else picture(colour, number) for number, colour in enumerate(colours or [])]
    rows = {"image": pictures or [picture("red", number) for number in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def test_every_part_is_read_by_its_own_names_of_classes(tmp_path):
    table(tmp_path / "train.parquet", ["red", "green", "blue"], [0, 1, 2])
    table(tmp_path / "turned.parquet", ["blue", "green", "red"], [0, 1, 2])
    table(tmp_path / "words.parquet", None, ["blue", "red"])
    for file, wanted in (("turned", ["blue", "green", "red"]), ("words", ["blue", "red"])):
        found, _ = read(tmp_path, TaskSource("a", dataset="train.parquet", test=f"{file}.parquet"))
        assert [found.classes[found.labels[place]] for place in found.places["test"]] == wanted


@pytest.mark.parametrize(("names", "labels"), [(["red", "green", "blue"], [0, 1, -1]), (None, ["red", "blue", None])])
def test_rows_without_a_label_are_refused(tmp_path, names, labels):
    table(tmp_path / "train.parquet", ["red", "green", "blue"], [0, 1, 2])
    table(tmp_path / "test.parquet", names, labels)
    with pytest.raises(
        ConfigError, match=rf"must have a label, got {labels[-1]!r} in 1 of 3 rows of test, row 2 first"
    ):
        read(tmp_path, TaskSource("a", dataset="train.parquet", test="test.parquet"))


def test_names_with_an_underscore_are_read_and_loose_images_are_told(tmp_path):
    write_classes(tmp_path / "a", 1, prefix="_")
    picture("red", 1).save(tmp_path / "a" / "_red" / "_DSC01.png")
    picture("red", 2).save(tmp_path / "a" / "lost.png")
    found, faults = read(tmp_path, TaskSource("a", folder="a"))
    assert found.classes == ("_blue", "_green", "_red")
    assert len(found.items) == 4
    with pytest.raises(ConfigError, match=r"1 lie beside the class folders in a: a/lost.png"):
        faults.refuse()


def test_a_link_that_leads_back_up_is_refused(tmp_path):
    write_classes(tmp_path / "a", 1)
    (tmp_path / "a" / "red" / "up").symlink_to(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"links must not lead back up, got .*red/up"):
        read(tmp_path, TaskSource("a", folder="a"))
