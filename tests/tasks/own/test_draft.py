"""The settings file that `keeplora init` writes: it can be read, whatever the names, and says why it is so."""

import os
import tomllib
from pathlib import Path

import pytest
from own_folders import classes, conversation, picture, write

from keeplora._files import WriteError
from keeplora.compare.runs import check_settings
from keeplora.methods.settings import ConfigError
from keeplora.tasks.own import FAULTS
from keeplora.tasks.own.draft import draft, init, split_sizes
from keeplora.tasks.own.draft_text import Lines, printable, quoted
from keeplora.tasks.own.look import look
from keeplora.tasks.own.look_tree import DataTask
from keeplora.train.config import load_config

STRANGE = [
    'o"wl',
    "back\\slash",
    "new\nline\ttab",
    "日本 ☃ é",
    "# no comment",
    "'''",
    "bell\a\x7f\x85",
    "{}",
    "🦉\u200d",
]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "my data"
    classes(folder / "birds", {"owl": 10, "tit": 20})
    classes(folder / "cars" / "train", {"old": 8, "new": 8})
    classes(folder / "cars" / "test", {"old": 2, "new": 2})
    return folder


def comments(path):
    return " ".join(line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines() if "#" in line)


def test_the_file_is_a_configuration_that_runs_take(data, tmp_path):
    out = tmp_path / "here" / "tasks.toml"
    summary = init(data, out)
    config = load_config(out)
    check_settings(config)  # methods and their settings, too
    assert config.methods == ("zero-shot", "lora", "keeplora")
    assert (config.benchmark, config.out, config.device) == (str(out)[:-5].rpartition("/")[2], "runs/tasks", "cpu")
    assert (config.own.model.open_clip, config.own.model.pretrained) == ("ViT-B-16", "openai")
    assert [(task.name, task.folder) for task in config.own.tasks] == [
        ("birds", "../my data/birds"), ("cars", "../my data/cars"),
    ]  # fmt: skip
    assert all(os.path.samefile(config.own.path(task.folder), data / task.name) for task in config.own.tasks)
    assert config.of("lora").learning_rate == config.of("keeplora").learning_rate == 1e-3
    assert summary.splitlines()[-2:] == [f"Written: {out}", f"Next: keeplora run {out} --dry-run"]
    assert '  "birds": train 30, 2 classes' in summary.splitlines()


def test_counts_stand_in_comments(data, tmp_path):
    init(data, tmp_path / "tasks.toml")
    text = comments(tmp_path / "tasks.toml")
    assert "30 images (train 30); about train 22, validation 2, test 6 after splitting." in text
    assert "20 images (test 4, train 16); about train 14, validation 2, test 4 after splitting." in text
    assert '2 classes: "owl", "tit"; the smallest is "owl" with 10 to train on' in text
    assert "46 of 46" not in text
    assert "50 of 50 images were opened (all)" in text
    assert "It is a choice and changes the numbers" in text


def test_split_sizes_are_whole():
    for n in range(50):
        assert sum(split_sizes(DataTask("a", "folder", Path("a"), {"train": n})).values()) == n
    given = DataTask("a", "folder", Path("a"), {"train": 10, "validation": 3, "test": 4})
    assert split_sizes(given) == {"train": 10, "validation": 3, "test": 4}


def test_faults_stand_there_to_be_decided(data, tmp_path):
    picture(data / "birds" / "owl" / "grey.png", "L")
    picture(data / "cars" / "train" / "old" / "grey.png", "L")
    (data / "birds" / "owl" / "bad.jpg").write_bytes(b"x")
    summary = init(data, tmp_path / "tasks.toml")
    config = load_config(tmp_path / "tasks.toml")
    assert dict(config.own.data.faults) == {"corrupt": "refuse", "grey": "refuse"}
    text = comments(tmp_path / "tasks.toml")
    assert '2 are grey, in "birds" (1), "cars" (1). The first: "birds/owl/grey.png" (mode L).' in text
    assert 'Otherwise: "skip" leaves them out or "convert" takes them as RGB.' in text
    assert "  grey: 2 are grey, birds/owl/grey.png first" in summary.splitlines()
    for kind in FAULTS:
        assert kind in text


def test_answers(tmp_path):
    picture(tmp_path / "images" / "0.png")
    write(tmp_path / "birds" / "train.json", [conversation("0.png")] * 20)
    write(tmp_path / "birds" / "test.json", [conversation("0.png")])
    init(tmp_path, tmp_path / "tasks.toml")
    own = load_config(tmp_path / "tasks.toml").own
    assert (own.answers, own.model.transformers, own.model.dtype) == (True, "llava-hf/llava-1.5-7b-hf", "bfloat16")
    (task,) = own.tasks
    assert (task.json, task.test, task.images) == ("birds/train.json", "birds/test.json", "images")
    check_settings(load_config(tmp_path / "tasks.toml"))


def test_tables(tmp_path):
    (tmp_path / "train.csv").write_text("img,species\na.jpg,owl\nb.jpg,tit\n")
    init(tmp_path, tmp_path / "tasks.toml")
    (task,) = load_config(tmp_path / "tasks.toml").own.tasks
    assert (task.dataset, task.image_column, task.label_column) == ("train.csv", "img", "species")
    assert f"columns of {tmp_path.name}: img, species" in comments(tmp_path / "tasks.toml")


def test_strange_names(tmp_path):
    for place, name in enumerate(STRANGE):
        classes(tmp_path / "data" / name, {f"{place}{STRANGE[-place]}": 1, f"{place}b\n[x]": 1})
        (tmp_path / "data" / name / f"{place}b\n[x]" / "no\nimage = 1").touch()
    init(tmp_path / "data", tmp_path / "tasks.toml")
    own = load_config(tmp_path / "tasks.toml").own
    assert {task.name for task in own.tasks} == set(STRANGE)
    for task in own.tasks:
        assert os.path.samefile(own.path(task.folder), tmp_path / "data" / task.name)


@pytest.mark.parametrize("name", [*STRANGE, "a" * 300])
def test_text_is_escaped(name):
    lines = Lines()
    lines.comment(name, f"it is {quoted(name)}")
    lines.set("name", name, name)
    assert tomllib.loads(lines.text()) == {"name": name}
    assert printable(name).isprintable()
    assert max(map(len, lines.text().splitlines())) <= max(112, len(name) + 20)


def test_a_folder_called_like_a_home(tmp_path, monkeypatch):
    classes(tmp_path / "~data", {"a": 1, "b": 1})
    monkeypatch.chdir(tmp_path)
    init("~data", "tasks.toml")
    own = load_config("tasks.toml").own
    assert os.path.samefile(own.path(own.tasks[0].folder), tmp_path / "~data")


def test_the_data_may_be_here(data, monkeypatch):
    monkeypatch.chdir(data / "birds")
    assert "keeplora run tasks.toml --dry-run" in init(".")
    (task,) = load_config("tasks.toml").own.tasks
    assert (task.name, task.folder) == ("birds", ".")


def test_a_file_behind_a_link_has_whole_paths(data, tmp_path, monkeypatch):
    """From a linked folder ``..`` leads elsewhere."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    init(data, tmp_path / "link" / "tasks.toml")
    own = load_config(tmp_path / "link" / "tasks.toml").own
    assert own.tasks[0].folder == str(data / "birds")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("ViT-B-32", ("ViT-B-32", "openai", "")),
        ("ViT-B-32/laion2b_s34b_b79k", ("ViT-B-32", "laion2b_s34b_b79k", "")),
        ("hf-hub:timm/siglip", ("hf-hub:timm/siglip", "", "")),
        ("transformers:openai/clip-vit-base-patch16", ("", "", "openai/clip-vit-base-patch16")),
    ],
)
def test_models(data, tmp_path, model, expected):
    init(data, tmp_path / "tasks.toml", model=model)
    source = load_config(tmp_path / "tasks.toml").own.model
    assert (source.open_clip, source.pretrained, source.transformers) == expected


def test_a_model_that_open_clip_does_not_have(data, tmp_path):
    with pytest.raises(ConfigError, match=r"got 'VitB16/openai'.* For a model of transformers write transformers:ID"):
        init(data, tmp_path / "tasks.toml", model="VitB16/openai")
    assert not (tmp_path / "tasks.toml").exists()


def test_a_file_that_is_there_is_kept(data, tmp_path, monkeypatch):
    out = tmp_path / "tasks.toml"
    out.write_text("mine")
    monkeypatch.setattr("keeplora.tasks.own.draft.look", lambda folder: pytest.fail("it looked first"))
    with pytest.raises(ConfigError, match=r"out must not be there, got '.*tasks.toml'. Add --force"):
        init(data, out)
    assert out.read_text() == "mine"
    monkeypatch.undo()
    init(data, out, force=True)
    assert load_config(out).own is not None


def test_a_link_to_nothing_is_there_too(data, tmp_path):
    (tmp_path / "tasks.toml").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="out must not be there"):
        init(data, tmp_path / "tasks.toml")


def test_other_endings_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"out must be a .toml file, got '.*tasks.yaml'"):
        init(data, tmp_path / "tasks.yaml")


def test_a_place_that_cannot_be_written(data, tmp_path):
    """A file where a folder must be, and a folder of somebody else's, unless we may do anything."""
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="must be writable"):
        init(data, tmp_path / "file" / "tasks.toml")
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o500)
    if not os.access(shut, os.W_OK):
        with pytest.raises(WriteError, match="Permission denied"):
            init(data, shut / "tasks.toml")
        assert not list(shut.iterdir())


def test_nothing_is_written_of_data_that_is_not_recognised(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"must hold class/\*.jpg.*got 1 .txt file \(notes.txt\)"):
        init(tmp_path, tmp_path / "tasks.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_small_tasks_are_passed_more_often(data, tmp_path):
    """30 images are a step of 32; a hundred thousand are enough in five passes."""
    seen = look(data)
    assert tomllib.loads(draft(seen, tmp_path / "tasks.toml"))["epochs"] == 40
    large = DataTask("large", "folder", data, {"train": 100_000}, {"a": {"train": 50_000}, "b": {"train": 50_000}})
    text = tomllib.loads(draft(type(seen)(data, (large,), (), 0, 0), tmp_path / "tasks.toml"))
    assert (text["epochs"], text["switch_fraction"]) == (5, 0.25)


def test_a_gpu_is_used(data, tmp_path):
    init(data, tmp_path / "tasks.toml", device="cuda", threads=4)
    config = load_config(tmp_path / "tasks.toml")
    assert (config.device, config.threads) == ("cuda", 4)
