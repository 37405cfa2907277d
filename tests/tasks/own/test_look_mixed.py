"""Folders of mixed depths and kinds: what can be read is drafted as a run reads it, and the rest is named."""

import pytest
from own_folders import classes, conversation, picture, write

from keeplora.tasks.own import Faults, ModelSource, OwnTasks, TaskSource
from keeplora.tasks.own.images import read_images
from keeplora.tasks.own.look import look

MIXED = {
    "loose": (["birds/owl/1", "birds/tit/1", "birds/loose", "cars/old/1", "cars/new/1"], ["birds", "cars"]),
    "depths": (["wild/birds/owl/1", "wild/birds/tit/1", "cars/old/1", "cars/new/1", "flat/1"], ["cars", "wild-birds"]),
    "splits": (["a/train/owl/1", "a/train/tit/1", "a/test/owl/1", "b/old/1", "b/new/1"], ["a", "b"]),
    "a split that has more": (["a/train/x/1", "a/train/y/1", "a/more/z/1", "b/old/1", "b/new/1"], ["b"]),
    "one class": (["a/owl/1", "b/old/1", "b/new/1"], ["b"]),
    "classes in classes": (["owl/1", "owl/2", "tit/great/1", "tit/blue/1", "tit/1"], ["data"]),
    "a class called train": (["a/train/1", "a/plane/1", "b/old/1", "b/new/1"], ["a", "b"]),
    "validation alone": (["a/val/owl/1", "a/val/tit/1", "b/training/x/1", "b/training/y/1"], ["b"]),
}


@pytest.mark.parametrize(("files", "names"), MIXED.values(), ids=MIXED)
def test_what_is_drafted_is_what_a_run_reads_and_the_rest_is_named(tmp_path, files, names):
    data = tmp_path / "data"
    for name in [*files, "notes", "empty/.hidden"]:
        picture(data / f"{name}.png") if name != "notes" else (data / "notes.txt").write_text("x")
    seen = look(data)
    assert [task.name for task in seen.tasks] == names
    read = {}
    for task in seen.tasks:
        own = OwnTasks(ModelSource(transformers="m"), (TaskSource(task.name, folder=str(task.place)),))
        faults = Faults(own.data)
        found = read_images(own.tasks[0], own, faults)
        read[task.name] = {split: len(places) for split, places in found.places.items()}
        assert read[task.name] == dict(task.counts)
        assert list(found.classes) == list(task.classes)
        mine = [fault.kind for fault in seen.faults if fault.task == task.name]
        assert sorted(mine) == sorted(fault.kind for fault in faults.found)
    told = "\n".join([*seen.remarks, *(remark for task in seen.tasks for remark in task.remarks)])
    assert "notes.txt" in told
    used = {path for task in seen.tasks for path in task.pictures}
    for name in files:  # taken, a fault that is told, or in a folder that is
        path = data / f"{name}.png"
        assert str(path) in used or any(fault.where == str(path) for fault in seen.faults) or any(
            word in told for word in (f" {above.name} " for above in path.parents)
        ) or str(path.parent.parent) in told  # fmt: skip


def test_kinds_that_one_model_learns_are_drafted_together_and_others_named(tmp_path):
    classes(tmp_path / "birds", {"owl": 3, "tit": 3})
    (tmp_path / "cars").mkdir()
    (tmp_path / "cars" / "train.csv").write_text("image,label\na.jpg,old\n")
    assert [(task.name, task.kind) for task in look(tmp_path).tasks] == [("birds", "folder"), ("cars", "dataset")]
    write(tmp_path / "asked" / "train.json", [conversation("0.png")] * 3)
    picture(tmp_path / "asked" / "images" / "train" / "0.png")
    write(tmp_path / "asked" / "more" / "train.json", [conversation("images/train/0.png")])
    seen = look(tmp_path)
    assert [(task.name, task.kind) for task in seen.tasks] == [("birds", "folder"), ("cars", "dataset")]
    (remark,) = [remark for remark in seen.remarks if remark.startswith("left out: tasks of answers")]
    assert str(tmp_path / "asked" / "more" / "train.json") in remark
    seen = look(tmp_path / "asked")
    assert [task.name for task in seen.tasks] == ["more", "asked"]
    assert not [remark for remark in seen.remarks if "left out" in remark]  # its images are used
