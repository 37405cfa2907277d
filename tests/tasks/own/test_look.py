"""What is recognised in a folder of data, layout by layout, and what is said of the rest."""

import os

import pytest
from own_folders import classes, conversation, picture, write
from PIL import Image

from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.look import look
from keeplora.tasks.own.look_headers import header_faults, look_at_headers


def kinds(seen):
    return sorted(fault.kind for fault in seen.faults)


def test_class_folders_are_one_task(tmp_path):
    classes(tmp_path / "birds", {"owl": 4, "blue tit": 3})
    picture(tmp_path / "birds" / ".thumbs" / "0.png")
    picture(tmp_path / "birds" / "owl" / ".hidden.png")
    seen = look(tmp_path / "birds")
    (task,) = seen.tasks
    assert (task.name, task.kind, task.place) == ("birds", "folder", tmp_path / "birds")
    assert dict(task.counts) == {"train": 7}
    assert task.classes == {"blue tit": {"train": 3}, "owl": {"train": 4}}
    assert (seen.pictures, seen.looked_at, seen.faults, seen.remarks) == (7, 7, (), ())
    assert not seen.answers


@pytest.mark.parametrize("ending", [".jpg", ".JPEG", ".Png", ".webp", ".BMP", ".gif", ".tif", ".TIFF"])
def test_endings_of_images(tmp_path, ending):
    classes(tmp_path, {"a": 1, "b": 1}, ending)
    assert dict(look(tmp_path).tasks[0].counts) == {"train": 2}


@pytest.mark.parametrize("validation", ["val", "Valid", "validation"])
def test_a_task_with_its_own_splits(tmp_path, validation):
    classes(tmp_path / "train", {"owl": 4, "tit": 5})
    classes(tmp_path / "test", {"owl": 2, "tit": 1})
    classes(tmp_path / validation, {"owl": 1})
    (task,) = look(tmp_path).tasks
    assert dict(task.counts) == {"train": 9, "test": 3, "validation": 1}
    assert task.classes["owl"] == {"train": 4, "test": 2, "validation": 1}
    assert task.remarks == (f"1 class of {tmp_path.name} has no folder in {validation}: tit",)


def test_folders_of_tasks_in_alphabetical_order(tmp_path):
    classes(tmp_path / "cars", {"old": 3, "new": 3})
    classes(tmp_path / "birds" / "train", {"owl": 4, "tit": 5})
    classes(tmp_path / "birds" / "test", {"owl": 2, "tit": 1})
    (tmp_path / "nothing").mkdir()
    (tmp_path / "README.md").write_text("mine")
    seen = look(tmp_path)
    assert [task.name for task in seen.tasks] == ["birds", "cars"]
    assert [dict(task.counts) for task in seen.tasks] == [{"test": 3, "train": 9}, {"train": 6}]
    assert seen.remarks == ("the folder nothing is empty, and left out", f"not used: README.md in {tmp_path}")


def test_classes_may_be_called_like_splits(tmp_path):
    """Vehicles: a train is one."""
    classes(tmp_path, {"train": 3, "plane": 3})
    assert list(look(tmp_path).tasks[0].classes) == ["plane", "train"]


def test_what_is_wrong_with_images(tmp_path):
    classes(tmp_path, {"a": 1, "b": 3})
    picture(tmp_path / "a" / "grey.png", "L")
    picture(tmp_path / "a" / "alpha.png", "RGBA")
    picture(tmp_path / "a" / "deep.png", "I;16")
    picture(tmp_path / "a" / "moves.gif", save_all=True, append_images=[Image.new("RGB", (5, 4), "red")])
    (tmp_path / "a" / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "a" / "empty.png").touch()
    (tmp_path / "a" / "Thumbs.db").touch()
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "c").mkdir()
    seen = look(tmp_path)
    assert kinds(seen) == ["alpha", "animated", "corrupt", "corrupt", "depth", "empty_class", "grey", "not_image"]
    where = {fault.kind: os.path.relpath(fault.where, tmp_path) for fault in seen.faults}
    assert (where["grey"], where["not_image"], where["empty_class"]) == ("a/grey.png", "a/notes.txt", "c")
    assert (seen.looked_at, seen.tasks[0].counts["train"]) == (10, 10)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("RGB", []), ("L", ["grey"]), ("1", ["grey"]), ("LA", ["grey", "alpha"]), ("RGBA", ["alpha"]), ("P", [])],
)
def test_modes(tmp_path, mode, expected):
    path = picture(tmp_path / "a.png", mode)
    assert [kind for kind, _ in header_faults(str(path))] == expected


def test_of_many_files_every_kth_is_opened(tmp_path):
    good, bad = str(picture(tmp_path / "good.png")), str(picture(tmp_path / "bad.png", "L"))
    files = [("t", bad if place % 3 == 0 else good) for place in range(10)]
    faults, opened = look_at_headers(files, most=4)  # every third
    assert (len(faults), opened) == (4, 4)
    assert look_at_headers(files, most=10)[1] == 10
    assert look_at_headers([], most=4) == ([], 0)


def test_small_classes_and_classes_without_words(tmp_path):
    classes(tmp_path, {"n01440764": 2, "n01443537": 3})
    few, numbers = look(tmp_path).tasks[0].remarks
    assert few == f"1 class of {tmp_path.name} with fewer than 3 images to train on: n01440764: 2"
    assert "called by numbers (n01440764, n01443537)" in numbers


def test_classes_of_two_tasks(tmp_path):
    classes(tmp_path / "a", {"Owl": 3, "tit": 3})
    classes(tmp_path / "b", {"owl": 3, "car": 3})
    (fault,) = look(tmp_path).faults
    assert (fault.kind, fault.task, fault.where, fault.why) == ("overlap", "b", "owl", "in a, too")


def test_links_are_followed_but_not_in_circles(tmp_path):
    classes(tmp_path / "elsewhere", {"owl": 3})
    data = classes(tmp_path / "data", {"tit": 3})
    (data / "owl").symlink_to(tmp_path / "elsewhere" / "owl")
    (data / "tit" / "up").symlink_to(data)
    seen = look(data)
    assert dict(seen.tasks[0].counts) == {"train": 6}
    assert seen.tasks[0].remarks == (f"up (a link that leads back up) in {data / 'tit'} is left out",)


def test_names_of_any_kind(tmp_path):
    names = ['o"wl\\', "new\nline", "日本 ☃", " lead", "a=[1]#"]
    classes(tmp_path, dict.fromkeys(names, 3))
    assert sorted(look(tmp_path).tasks[0].classes) == sorted(names)


def test_a_folder_that_is_not_utf8_is_named(tmp_path):
    classes(tmp_path, {"owl": 3, os.fsdecode(b"caf\xe9"): 3})
    with pytest.raises(ConfigError, match=r"names of folders must be UTF-8, got b'caf\\xe9'. Rename it"):
        look(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "must hold class.*, got nothing"),
        (["a.txt", "b.csv"], r"got 1 .txt file \(a.txt\), 1 .csv file \(b.csv\)"),
        (["1.jpg", "2.jpg"], r"got 2 .jpg files \(1.jpg, 2.jpg\)"),
        (["owl/1.jpg"], "at least two classes, got owl alone"),
        (["train/1.jpg", "test/1.jpg"], "splits must hold class folders, got images themselves in test, train"),
        (["test/owl/1.jpg", "test/tit/1.jpg"], "must have training images, got only test"),
        (["train/birds/owl/1.jpg", "test/birds/owl/1.jpg"], "must lie in folders of tasks, got tasks in test, train"),
        (
            ["birds/tit/1.jpg", "cars/notes.txt"],
            r"cars is left out: no class folders, but 1 .txt(.|\n)*got tit alone in",
        ),
        (["train/tit/1.jpg", "more/owl/1.jpg"], "splits alone beside train, .* and more otherwise"),
        (["train/tit/1.jpg", "val/tit/1.jpg", "valid/tit/1.jpg"], "one folder, got val and valid"),
        (["a/b/c/d/e/1.jpg"], "a folder more than 4 deep|at most 4 folders deep"),
        (["state.json"], "must hold arrow files beside state.json"),
    ],
)
def test_other_contents_are_named(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError, match=message):
        look(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"folder must be a folder that exists, got '.*gone'"):
        look(tmp_path / "gone")


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("place", ["", "images", "birds", "birds/images"])
def test_samples_in_llavas_form(tmp_path, ending, place):
    """Whatever folder the paths begin in."""
    for number in range(3):
        picture(tmp_path / place / "pics" / f"{number}.png")
    samples = [conversation(f"pics/{number}.png") for number in range(4)]
    write(tmp_path / "birds" / f"train_4.{ending}", samples)
    write(tmp_path / "birds" / f"test.{ending}", [conversation("pics/0.png", answer=""), conversation()])
    seen = look(tmp_path)
    (task,) = seen.tasks
    assert (task.name, task.kind, task.place) == ("birds", "json", tmp_path / "birds" / f"train_4.{ending}")
    assert (dict(task.counts), task.test) == ({"train": 4, "test": 2}, tmp_path / "birds" / f"test.{ending}")
    assert (task.images or tmp_path / "birds") == tmp_path / place
    assert task.remarks[0] == f"3 of the first 4 images of birds are there, in {tmp_path / place}"
    assert kinds(seen) == ["empty_answer", "missing"]
    assert seen.answers
    assert seen.pictures == 3


def test_files_of_several_tasks_in_one_folder(tmp_path):
    for name in ("birds_train", "birds_test", "cars", "birds-val"):
        write(tmp_path / f"{name}.json", [conversation()])
    write(tmp_path / "names.json", {"0": "owl"})
    (tmp_path / "broken.json").write_text("[")
    seen = look(tmp_path)
    assert [(task.name, sorted(task.counts)) for task in seen.tasks] == [
        ("birds", ["test", "train", "validation"]), ("cars", ["train"]),
    ]  # fmt: skip
    assert f"{tmp_path / 'names.json'} holds no questions with answers" in seen.remarks
    assert any("broken.json must be JSON" in remark for remark in seen.remarks)


def test_several_tasks_in_a_folder_of_the_folder(tmp_path):
    write(tmp_path / "birds" / "owls.json", [conversation()])
    write(tmp_path / "birds" / "tits.json", [conversation(answer="")])
    seen = look(tmp_path)
    assert [task.name for task in seen.tasks] == ["birds-owls", "birds-tits"]
    assert [(fault.kind, fault.task) for fault in seen.faults] == [("empty_answer", "birds-tits")]


def test_questions_with_answers_are_samples_too(tmp_path):
    good = {"question_id": 1, "image": "a.png", "text": "What?", "answer": "An owl"}
    write(tmp_path / "train.jsonl", [good, {**good, "text": " "}, {"question_id": 2, "text": "What?"}])
    seen = look(tmp_path)
    assert kinds(seen) == ["empty_answer", "empty_answer", "missing"]
    assert [fault.where for fault in seen.faults if fault.kind == "empty_answer"] == [
        "train.jsonl: line 2", "train.jsonl: line 3",
    ]  # fmt: skip


def test_images_that_are_nowhere(tmp_path):
    write(tmp_path / "birds" / "train.json", [{**conversation("a.png"), "video": "b.mp4"}])
    seen = look(tmp_path)
    places = [tmp_path / "birds", tmp_path, tmp_path / "birds" / "images", tmp_path / "images"]
    assert seen.tasks[0].remarks == (
        f"none of the first 2 images of birds are there, looked for in {', '.join(map(str, places))}",
    )
    assert [(fault.kind, fault.where) for fault in seen.faults] == [("missing", "a.png"), ("missing", "b.mp4")]
    (tmp_path / "b.mp4").touch()
    assert look(tmp_path).pictures == 0  # a video's header is not an image's


def test_folders_of_splits_with_samples(tmp_path):
    write(tmp_path / "train" / "data.json", [conversation()])
    write(tmp_path / "test" / "data.json", [conversation(), conversation()])
    (task,) = look(tmp_path).tasks
    assert (dict(task.counts), task.test) == ({"test": 2, "train": 1}, tmp_path / "test" / "data.json")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["test.json"], "must have training samples, got only test.json"),
        (["train.json", "train_2.json"], "one file for each split, got train.json and train_2.json"),
    ],
)
def test_samples_that_are_no_task(tmp_path, names, message):
    for name in names:
        write(tmp_path / name, [conversation()])
    with pytest.raises(ConfigError, match=message):
        look(tmp_path)


def test_a_table_of_paths(tmp_path):
    (tmp_path / "train.csv").write_text("img,species,note\na.jpg,owl,x\nb.jpg,tit,y\nc.jpg,owl,z\n")
    write(tmp_path / "test.jsonl", [])
    (task,) = look(tmp_path).tasks
    assert (task.kind, task.place, task.image_column, task.label_column) == (
        "dataset", tmp_path / "train.csv", "img", "species",
    )  # fmt: skip
    assert task.classes == {"owl": {"train": 2}, "tit": {"train": 1}}


def test_a_table_of_lines(tmp_path):
    write(tmp_path / "birds.jsonl", [{"image": "a.png", "label": name} for name in ("owl", "tit", "owl")])
    seen = look(tmp_path)
    assert (seen.tasks[0].kind, seen.tasks[0].label_column, seen.remarks) == ("dataset", "label", ())


def test_a_folder_with_metadata(tmp_path):
    """What `datasets` calls an image folder: its column file_name becomes image."""
    for number in range(3):
        picture(tmp_path / f"{number}.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,owl\n1.png,tit\n2.png,tit\n")
    (task,) = look(tmp_path).tasks
    assert (task.place, task.image_column, task.label_column) == (tmp_path, "image", "label")


def test_tables_without_images_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nhello,greeting\n")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError) as caught:
        look(tmp_path)
    assert "a.csv has no column of images, only text, label" in str(caught.value)
    assert "b.csv must be csv that can be read, got: 'utf-8' codec" in str(caught.value)


def test_pipes_are_not_waited_for(tmp_path):
    classes(tmp_path, {"a": 1, "b": 1})
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe.csv")
    os.mkfifo(tmp_path / "pipe.json")
    assert kinds(look(tmp_path)) == ["corrupt"]


def test_a_table_beside_class_folders_is_not_used(tmp_path):
    classes(tmp_path, {"owl": 3, "tit": 3})
    (tmp_path / "labels.csv").write_text("path,label\nowl/0.png,owl\n")
    seen = look(tmp_path)
    assert seen.tasks[0].kind == "folder"
    assert any("labels.csv is not used" in remark for remark in seen.remarks)


def a_dataset():
    import datasets

    features = datasets.Features({"label": datasets.ClassLabel(names=["owl", "tit"]), "photo": datasets.Image()})
    pictures = [Image.new("RGB", (4, 4))] * 5
    return datasets.Dataset.from_dict({"label": [0, 1, 1, 0, 1], "photo": pictures}, features=features)


def test_parquet(tmp_path):
    data = a_dataset()
    data.to_parquet(tmp_path / "birds" / "train-00000-of-00001.parquet")
    data.select(range(2)).to_parquet(tmp_path / "birds" / "test-00000-of-00001.parquet")
    (task,) = look(tmp_path).tasks
    assert (task.name, task.image_column, task.label_column) == ("birds", "photo", "label")
    assert dict(task.counts) == {"test": 2, "train": 5}
    assert task.classes["tit"] == {"test": 1, "train": 3}
    assert task.place.name == "train-00000-of-00001.parquet"
    data.to_parquet(tmp_path / "birds" / "train-00001-of-00002.parquet")
    (task,) = look(tmp_path).tasks
    assert (task.place, dict(task.counts)) == (tmp_path / "birds", {"test": 2, "train": 10})


def test_saved_datasets(tmp_path):
    import datasets

    data = a_dataset()
    data.save_to_disk(str(tmp_path / "one"))
    (task,) = look(tmp_path / "one").tasks
    assert (task.place, dict(task.counts), task.image_column) == (tmp_path / "one", {"train": 5}, "photo")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "two"))
    (task,) = look(tmp_path / "two").tasks
    assert (task.name, task.place, task.test) == ("two", tmp_path / "two" / "train", tmp_path / "two" / "test")
    assert dict(task.counts) == {"test": 1, "train": 5}


def test_without_datasets_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "train.parquet").write_bytes(b"")
    (task,) = look(tmp_path).tasks
    assert "datasets is not installed. Run pip install 'keeplora[datasets]'" in task.remarks[0]
    assert (task.image_column, task.label_column, dict(task.counts)) == ("image", "label", {})


def test_a_broken_table_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no table")
    with pytest.raises(ConfigError, match=r"train.parquet must be a table that can be read, got"):
        look(tmp_path)
