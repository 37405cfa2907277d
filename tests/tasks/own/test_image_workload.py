"""A user's own image tasks, from folders to a model that plain open_clip and transformers load."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tasks.own.places import picture, write_classes, write_model

from keeplora.compare.runs import check_methods
from keeplora.methods.settings import ConfigError
from keeplora.tasks.own import DataSettings, ModelSource, OwnTasks, TaskSource, open_workload
from keeplora.tasks.workload import EvenlyWorkload, ItemWorkload
from keeplora.train.config import parse_config
from keeplora.train.loop import run_one


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and two tasks."""
    folder = tmp_path_factory.mktemp("own")
    write_model(folder / "model")
    write_classes(folder / "light", 10)
    write_classes(folder / "dark", 10, prefix="dark_")
    return folder


def own(place, *tasks, model=None, **data):
    source = ModelSource(open_clip="local-dir:model") if model is None else model
    return OwnTasks(source, tasks, DataSettings(**{"cache": "cache", **data}), base=str(place))


LIGHT, DARK = TaskSource("light", folder="light"), TaskSource("dark", folder="dark")


def test_it_is_a_workload_with_tasks_splits_and_texts(place):
    workload = open_workload(own(place, LIGHT, DARK))
    assert isinstance(workload, ItemWorkload)
    assert list(workload.tasks) == ["light", "dark"]
    task = workload.task(1)
    assert task.texts[0] == "a photo of a dark blue."
    assert {split: len(places) for split, places in task.places.items()} == {"train": 21, "validation": 3, "test": 6}
    assert not set(task.places["train"]) & set(task.places["test"])
    assert any("21 train, 3 validation, 6 test" in line for line in workload.notes())


def test_pixels_and_accuracy_are_those_of_plain_open_clip(place):
    workload = open_workload(own(place, LIGHT))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{place / 'model'}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{place / 'model'}")
    task = workload.task(0)
    files = sorted((place / "light").glob("*/*.png"))
    plain = torch.stack([preprocess(Image.open(file).convert("RGB")) for file in files])
    ours = workload._model.normalised(task.images[range(30)], torch.float32)
    assert (ours - plain).abs().max() < 1e-6
    with torch.no_grad():
        texts = model.eval().encode_text(tokenize([f"a photo of a {name}." for name in task.classes]), normalize=True)
        right = (model.encode_image(plain, normalize=True) @ texts.T).argmax(1) == task.labels
    for split in ("train", "test"):
        torch.testing.assert_close(workload.correct(workload.model(), 0, split, 4), right[task.places[split]])


def test_a_pass_sees_every_training_image_once_in_an_order_of_the_seed(place):
    workload = open_workload(own(place, LIGHT))
    first, again, other = ([batch.labels for batch in workload.batches(0, 8, seed)] for seed in (1, 1, 2))
    assert [len(labels) for labels in first] == [8, 8, 5]
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    assert torch.cat(first).bincount().tolist() == [7, 7, 7]


def test_evenly_spaced_images_are_what_a_method_sees_before_a_task(place, monkeypatch):
    workload = open_workload(own(place, LIGHT))
    assert isinstance(workload, EvenlyWorkload)
    train = workload.task(0).places["train"]
    some = [train[i * len(train) // 4] for i in range(4)]  # of 21, a fifth
    seen = [batch.images for batch in workload.evenly(0, 3, 5, 0.2)]
    assert [len(images) for images in seen] == [3, 1]
    wanted = workload.task(0).images[some]
    assert sorted(torch.cat(seen).flatten(1).sum(1).tolist()) == sorted(wanted.flatten(1).sum(1).tolist())
    calls = []
    monkeypatch.setattr(workload, "evenly", lambda *given: calls.append(given) or workload.batches(*given[:3]))
    values = {"benchmark": "x", "methods": ["keeplora"], "steps": 1, "switch_fraction": 0.2, "switch_order": "evenly"}
    config = parse_config({**values, "tensorboard": False, "method": {"keeplora": {"r": 2}}})
    check_methods(config, workload)
    run_one(config, workload, "keeplora", 0)
    assert {(task, share) for task, _, _, share in calls} == {(0, 0.2)}
    assert (
        parse_config({**values, "switch_order": "shuffled"}).identity("keeplora", 0).keys()
        < config.identity("keeplora", 0).keys()
    )


def test_decoded_images_are_used_again_and_nothing_depends_on_them(place, monkeypatch):
    kept = open_workload(own(place, LIGHT))
    monkeypatch.setattr("keeplora.tasks.own.decoded._look", None)  # nothing may be decoded again
    again = open_workload(own(place, LIGHT))
    monkeypatch.undo()
    anew = open_workload(own(place, LIGHT, cache_gb=0.0))
    assert "decoded again in every pass, beyond cache_gb = 0: light (30 of 30)" in anew.notes()
    some = open_workload(own(place, LIGHT, cache_gb=32 * 32 * 3 * 7.5 / 1e9))
    assert "light (23 of 30)" in "".join(some.notes())
    for other in (again, anew, some, open_workload(own(place, LIGHT))):
        assert other.fingerprint() == kept.fingerprint()
        assert torch.equal(other.task(0).images[[5, 0, 7]], kept.task(0).images[[5, 0, 7]])


def test_a_changed_image_is_noticed(place, tmp_path):
    write_classes(tmp_path / "light", 3)
    write_model(tmp_path / "model")
    before = open_workload(own(tmp_path, LIGHT))
    seen = before.task(0).images[[0]]
    picture("green", 77, (60, 50)).save(tmp_path / "light" / "blue" / "00.png")
    after = open_workload(own(tmp_path, LIGHT))
    assert after.fingerprint() != before.fingerprint()
    assert not torch.equal(after.task(0).images[[0]], seen)


@pytest.fixture
def faulty(place, tmp_path):
    write_classes(tmp_path / "light", 6)
    (tmp_path / "model").symlink_to(place / "model")
    blue = tmp_path / "light" / "blue"
    (blue / "00.png").write_bytes((blue / "00.png").read_bytes()[:200])
    (blue / "01.png").write_bytes(b"")
    Image.new("L", (40, 40), 99).save(blue / "02.png")
    Image.fromarray(np.full((40, 40, 4), 128, np.uint8), "RGBA").save(blue / "03.png")
    return tmp_path


def test_all_faults_are_told_at_once_with_their_remedies(faulty):
    with pytest.raises(ConfigError) as told:
        open_workload(own(faulty, LIGHT, template="a {} " + "very " * 40))
    text = str(told.value)
    assert "2 cannot be decoded in light: blue/00.png" in text
    assert "1 are grey in light: blue/02.png (mode L)" in text
    assert "1 have transparency in light: blue/03.png" in text
    assert "3 are texts longer than the model's context in light: 'a blue very" in text
    for remedy in ('corrupt = "skip"', 'grey = "skip" or "convert"', 'long_text = "cut"'):
        assert remedy in text


def test_faults_are_skipped_or_converted_where_the_file_says_so_and_told(faulty):
    faults = {"corrupt": "skip", "grey": "convert", "alpha": "skip"}
    workload = open_workload(own(faulty, LIGHT, faults=faults, test_fraction=0.4))
    task = workload.task(0)
    used = {place for places in task.places.values() for place in places}
    assert used == set(range(18)) - {0, 1, 3}
    assert task.images[[2]].unique().tolist() == [99]
    assert workload.notes()[:3] == [
        "2 cannot be decoded in light: blue/00.png (image file is truncated), blue/01.png (an empty file): left out, "
        "as [data.faults] says",
        "1 have transparency in light: blue/03.png (mode RGBA): left out, as [data.faults] says",
        "1 are grey in light: blue/02.png (mode L): converted to RGB, as [data.faults] says",
    ]


def test_classes_that_two_tasks_share_are_refused_or_allowed(place):
    again = TaskSource("again", folder="light")
    with pytest.raises(ConfigError, match="3 are classes that two tasks share in again: 'blue' "):
        open_workload(own(place, LIGHT, again))
    assert open_workload(own(place, LIGHT, again, faults={"overlap": "allow"})).tasks == ["light", "again"]


def test_a_quick_look_evaluates_fewer_and_says_so(place):
    workload = open_workload(own(place, LIGHT, evaluate_at_most=2))
    assert len(workload.correct(workload.model(), 0, "test", 8)) == workload.evaluated(0) == 2
    assert any("at most 2 images of a split are evaluated" in line for line in workload.notes())


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (ModelSource(open_clip="ViT-B-61", pretrained="openai"), "got 'ViT-B-61'.*'ViT-B-16'"),
        (ModelSource(open_clip="ViT-B-16", pretrained="opnai"), "pretrained must be a file or one of.*'openai'"),
        (ModelSource(open_clip="local-dir:nowhere"), "must load.*nowhere"),
        (ModelSource(transformers="nowhere/at-all"), "must name a model, got 'nowhere/at-all'.*not on this disk"),
    ],
)
def test_models_that_cannot_be_had_are_refused(place, source, named, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=named):
        open_workload(own(place, LIGHT, model=source))


def test_weights_that_cannot_be_downloaded_are_not_tried_again_and_again(place, monkeypatch):
    """open_clip's download would take a minute and a half to say so."""
    asked = []
    monkeypatch.setattr("keeplora.tasks.own.comparing.hub_fault", lambda *names: asked.append(names) or "no network")
    with pytest.raises(ConfigError, match=r"weights of 'ViT-B-16' must .*got 'openai' of timm/.*: no network"):
        open_workload(own(place, LIGHT, model=ModelSource(open_clip="ViT-B-16", pretrained="openai")))
    [(repository, *files)] = asked
    assert repository.startswith("timm/")
    assert "open_clip_model.safetensors" in files


def test_weights_that_are_missing_are_never_random(place, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "open_clip_config.json").write_text((place / "model" / "open_clip_config.json").read_text())
    write_classes(tmp_path / "light", 3)
    with pytest.raises(ConfigError, match="must load"):
        open_workload(own(tmp_path, LIGHT))


def test_a_saved_model_is_the_same_in_plain_open_clip(place, tmp_path):
    workload = open_workload(own(place, LIGHT))
    model = workload.model()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    how = workload.save_model(model, tmp_path / "out")
    loaded, _, preprocess = eval(how, {"open_clip": open_clip})
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["preprocess_cfg"]["std"] == [0.25] * 3
    assert preprocess(picture("red", 0)).shape == (3, 32, 32)


def test_a_class_may_be_the_mean_of_its_texts_in_tests(place):
    templates = ["a photo of a {}.", "{}", "the colour {}"]
    plain = open_workload(own(place, LIGHT))
    workload = open_workload(own(place, LIGHT, templates=templates, test_texts="mean"))
    model, task = workload.model(), workload.task(0)
    assert torch.equal(task.tokens, plain.task(0).tokens)  # what is trained with
    tokenize = open_clip.get_tokenizer(f"local-dir:{place / 'model'}")
    with torch.no_grad():
        each = [model.encode_text(tokenize([t.format(n) for n in task.classes]), normalize=True) for t in templates]
        texts = torch.nn.functional.normalize(torch.stack(each).mean(0), dim=-1)
        x = workload._model.normalised(task.images[task.places["train"]], torch.float32)
        right = (model.encode_image(x, normalize=True) @ texts.T).argmax(1) == task.labels[task.places["train"]]
        ours, first = (one._class_features(model, one.task(0), x.device) for one in (workload, plain))
    assert torch.equal(workload.correct(model, 0, "train", 8), right)
    torch.testing.assert_close(ours, texts)
    assert (first - texts).norm() > 0.1 * texts.norm()
    assert plain.fingerprint() != workload.fingerprint()


def test_images_that_changed_and_kept_their_size_are_other_images(place, tmp_path):
    (tmp_path / "model").symlink_to(place / "model")
    write_classes(tmp_path / "light", 3, suffix=".bmp")
    before = open_workload(own(tmp_path, LIGHT))
    picture("green", 5).save(tmp_path / "light" / "red" / "00.bmp")
    after = open_workload(own(tmp_path, LIGHT))
    assert after.fingerprint() != before.fingerprint()
    assert not torch.equal(after.task(0).images[[6]], before.task(0).images[[6]])


def test_files_that_a_table_names_are_looked_at_and_missing_ones_told(place, tmp_path):
    (tmp_path / "model").symlink_to(place / "model")
    write_classes(tmp_path / "d", 4)
    lines = [f"{name}/{number:02}.png,{name}" for name in ("red", "blue") for number in range(4)]
    (tmp_path / "d" / "all.csv").write_text("\n".join(["file,kind", *lines]) + "\n")
    source = TaskSource("t", dataset="d/all.csv", image_column="file")
    before = open_workload(own(tmp_path, source))
    picture("green", 5, (60, 50)).save(tmp_path / "d" / "red" / "00.png")
    assert open_workload(own(tmp_path, source)).fingerprint() != before.fingerprint()
    (tmp_path / "d" / "red" / "01.png").unlink()
    with pytest.raises(ConfigError, match=r"1 are named by annotations and not there in t: train\[1\]: red/01.png"):
        open_workload(own(tmp_path, source))
    left = open_workload(own(tmp_path, source, faults={"missing": "skip"}))
    assert sum(map(len, left.task(0).places.values())) == 7


@pytest.mark.parametrize("harm", [b"{damaged", b""])
def test_a_damaged_cache_is_made_again(place, tmp_path, harm):
    first = open_workload(own(place, LIGHT, cache=str(tmp_path)))
    pixels = first.task(0).images[range(30)]
    for file in tmp_path.iterdir():
        raw = file.read_bytes()
        file.write_bytes(harm + raw[len(harm) :] if harm and file.suffix == ".pixels" else harm)
    again = open_workload(own(place, LIGHT, cache=str(tmp_path)))
    assert torch.equal(again.task(0).images[range(30)], pixels)


def test_a_cache_that_cannot_be_written_to_is_named_with_what_helps(place, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"cache must be a folder with room.*file.*cache_gb = 0"):
        open_workload(own(place, LIGHT, cache=str(tmp_path / "file")))


def test_two_classes_of_one_text_are_refused(place, tmp_path):
    (tmp_path / "model").symlink_to(place / "model")
    write_classes(tmp_path / "light", 2, names=("red", "blue"), prefix="dark_")
    write_classes(tmp_path / "light", 2, names=("red",), prefix="dark ")
    with pytest.raises(ConfigError, match="two that read 'dark red' in task 'light'"):
        open_workload(own(tmp_path, LIGHT, faults={"overlap": "allow"}))


def test_contents_of_a_split_are_other_where_its_evaluation_may_be(place, tmp_path):
    plain = open_workload(own(place, LIGHT, DARK))
    assert plain.contents(0, "test") == open_workload(own(place, LIGHT, DARK, readers=1)).contents(0, "test")
    asked = TaskSource("light", folder="light", template="art of a {}.")
    others = [
        plain.contents(0, "validation"),
        plain.contents(1, "test"),
        *(open_workload(own(place, task, DARK, **data)).contents(0, "test") for task, data in (
            (asked, {}), (LIGHT, {"evaluate_at_most": 3}), (LIGHT, {"split_seed": 1}),
        )),
    ]  # fmt: skip
    plain._model._chosen["interpolation"] = "nearest"
    others.append(plain.contents(0, "test"))
    assert len({open_workload(own(place, LIGHT, DARK)).contents(0, "test"), *others}) == 1 + len(others)
