"""A look at a folder of data: which tasks it holds, how many images by class and split, and what is wrong with them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from keeplora._messages import listed
from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.faults import Fault
from keeplora.tasks.own.look_datasets import dataset_tasks
from keeplora.tasks.own.look_headers import MOST, look_at_headers
from keeplora.tasks.own.look_json import json_tasks
from keeplora.tasks.own.look_tree import DEPTH, DataFolder, DataTask, Folder, joined, read_folder, renamed, split_named

__all__ = ["FEWEST", "look"]

FEWEST = 3
"""Images that every class should have: one for training, one for choices, one for testing."""
_EXPECTED = (
    "class/*.jpg, train/class/*.jpg and test/class/*.jpg, either of these in a folder for each task, JSON in LLaVA's "
    f"form, or what `datasets` reads with a column of images; at most {DEPTH} folders deep"
)


def look(folder: str | os.PathLike[str], *, most: int = MOST) -> DataFolder:
    """What a folder holds, up to four folders deep; hidden files are passed over, links followed. Nothing is written.

    Recognised are class folders of images, with or without folders for the splits, for one task or for one in each
    folder; JSON and JSONL in LLaVA's form, by content; and tables with a column of images.

    Args:
        most: Image files of which the header is opened; of more, every k-th is.

    Raises:
        ConfigError: the folder holds something else, or several kinds of data; the message names both.
        OSError: a folder in it cannot be read.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cats", "dogs"):
        ...         (Path(folder) / name).mkdir()
        ...         (Path(folder) / name / "1.jpg").touch()
        ...     seen = look(folder)
        >>> [(task.kind, list(task.classes), dict(task.counts)) for task in seen.tasks]
        [('folder', ['cats', 'dogs'], {'train': 2})]
        >>> [fault.kind for fault in seen.faults]
        ['corrupt', 'corrupt']
    """
    path = Path(os.path.abspath(folder))
    if not path.is_dir():
        raise ConfigError(f"look: folder must be a folder that exists, got {os.fspath(folder)!r}")
    tree = read_folder(path)
    tasks, remarks = _tasks(tree)
    for task in tasks:
        _check_names(task)
        if task.kind == "folder" and sum(any(counts.values()) for counts in task.classes.values()) < 2:
            raise ConfigError(
                f"look: every task must have images of at least two classes, got {listed(list(task.classes))} alone in "
                f"{task.place}. Expected is {_EXPECTED}"
            )
    tasks = [replace(task, remarks=(*task.remarks, *_advice(task))) for task in tasks]
    remarks += [f"{where} is left out" for where in tree.deeper]
    pictures = [(task.name, picture) for task in tasks for picture in task.pictures]
    try:
        headers, looked_at = look_at_headers(pictures, most)
    except ImportError:
        headers, looked_at = [], 0
        remarks.append("no image was opened: Pillow is not installed. Run pip install 'keeplora[datasets]'")
    faults = [*headers, *(fault for task in tasks for fault in task.faults), *_overlaps(tasks)]
    return DataFolder(path, tuple(tasks), tuple(faults), looked_at, len(pictures), tuple(dict.fromkeys(remarks)))


def _tasks(tree: Folder) -> tuple[list[DataTask], list[str]]:
    """The tasks of a folder, by names, and remarks on what is left out."""
    own, remarks, parts = _tables(tree, tree)
    inner: dict[str, list[DataTask]] = {}
    for sub in tree.folders:
        if sub.name not in parts:
            inner[sub.name], more, _ = _tables(sub, tree)
            remarks += more
    below = [
        renamed(task, name if len(tasks) == 1 else f"{name}-{task.name}")
        for name, tasks in inner.items()
        for task in tasks
    ]
    tables = [*own, *below]
    if tables:
        without = [sub.name for sub in tree.folders if not inner.get(sub.name) and sub.has_pictures()]
        kinds = {task.kind for task in tables}
        if len(kinds) > 1 or (own and below) or (not own and kinds == {"dataset"} and without):
            raise _unexpected(tree, "one kind of data, in the folder or in folders of it", remarks)
        return tables, remarks
    if (single := _class_task(tree)) is not None:
        return [single], remarks
    several, others = [], []
    for sub in tree.folders:
        if (task := _class_task(sub)) is not None:
            several.append(task)
        elif sub.empty:
            remarks.append(f"the folder {sub.name} is empty, and left out")
        else:
            others.append(sub.name)
    if not several:
        raise _unexpected(tree, _EXPECTED, remarks)
    if others:
        raise _unexpected(tree, f"class folders of images in every folder, as in {several[0].name}", remarks, others)
    if tree.files:
        remarks.append(f"not used: {listed(tree.files)} in {tree.path}")
    return several, remarks


def _tables(folder: Folder, root: Folder) -> tuple[list[DataTask], list[str], list[str]]:
    """Tasks of JSON or tables in a folder, or in folders of it that are called after splits; remarks; those folders."""
    tasks, remarks = _own_tables(folder, root)
    if tasks:
        return tasks, remarks, []
    parts: dict[str, DataTask] = {}
    names = []
    for sub in folder.folders:
        if (split := split_named(sub.name)) is not None:
            inner, more = _own_tables(sub, root)
            remarks += more
            if len(inner) == 1 and split not in parts:
                parts[split] = inner[0]
                names.append(sub.name)
    if "train" not in parts:
        return [], remarks, []
    return [joined(folder.path.name or "data", parts)], remarks, names


def _own_tables(folder: Folder, root: Folder) -> tuple[list[DataTask], list[str]]:
    samples, remarks = json_tasks(folder, root.path)
    tables, more = dataset_tasks(folder)
    used = {name for name in folder.files if name.lower().endswith((".csv", ".jsonl"))}
    if tables and not samples and tables[0].place.name in used and _is_class_task(folder):
        more.append(f"{tables[0].place} is not used: the class folders beside it are")
        tables = []
    return [*samples, *tables], [*remarks, *more]


def _is_class_task(folder: Folder) -> bool:
    try:
        task = _class_task(folder)
    except ConfigError:
        return False
    return task is not None and len(task.classes) > 1


def _class_task(folder: Folder) -> DataTask | None:
    """The task whose class folders these are, or None where the folders hold no images themselves.

    Raises:
        ConfigError: folders of different kinds beside each other.
    """
    splits = {sub.name: split for sub in folder.folders if (split := split_named(sub.name)) is not None}
    if splits and any(_holds_classes(sub) for sub in folder.folders if sub.name in splits):
        return _split_task(folder, splits)
    direct = [sub for sub in folder.folders if sub.pictures]
    if not direct:
        if any(_holds_tasks(sub) for sub in folder.folders if sub.name in splits):
            raise ConfigError(
                f"look: folders of splits must lie in folders of tasks, got tasks in {listed(list(splits))} of "
                f"{folder.path}. Expected is task/train/class/*.jpg"
            )
        return None
    if all(sub.name in splits for sub in direct):
        raise ConfigError(
            f"look: folders of splits must hold class folders, got images themselves in "
            f"{listed([sub.name for sub in direct])} of {folder.path}. Expected is train/class/*.jpg"
        )
    nested = [sub.name for sub in folder.folders if any(inner.has_pictures() for inner in sub.folders)]
    if nested:
        raise _unexpected(folder, f"class folders alone, as {direct[0].name} is one", [], nested)
    return _made(folder, {"train": folder})


def _split_task(folder: Folder, splits: Mapping[str, str]) -> DataTask:
    others = [sub.name for sub in folder.folders if sub.name not in splits and sub.has_pictures()]
    if others:
        raise _unexpected(folder, f"no images beside {listed(list(splits))}", [], others)
    parts: dict[str, Folder] = {}
    for sub in folder.folders:
        if sub.name not in splits or not sub.has_pictures():
            continue
        if splits[sub.name] in parts:
            raise ConfigError(
                f"look: every split must have one folder, got {parts[splits[sub.name]].name} and {sub.name} in "
                f"{folder.path}"
            )
        if not _holds_classes(sub) or any(inner.has_pictures() for each in sub.folders for inner in each.folders):
            raise _unexpected(sub, "class folders with images", [])
        parts[splits[sub.name]] = sub
    if "train" not in parts:
        raise ConfigError(
            f"look: every task must have training images, got only {listed([sub.name for sub in parts.values()])} in "
            f"{folder.path}. Call the folder train"
        )
    return _made(folder, parts)


def _made(folder: Folder, parts: Mapping[str, Folder]) -> DataTask:
    name = folder.path.name or "data"
    classes: dict[str, dict[str, int]] = {}
    faults = []
    remarks = []
    pictures: list[str] = []
    for split, part in parts.items():
        for sub in part.folders:
            classes.setdefault(sub.name, dict.fromkeys(parts, 0))[split] = len(sub.pictures)
            pictures += [os.path.join(sub.path, picture) for picture in sub.pictures]
            faults += [Fault("not_image", name, str(sub.path / stranger)) for stranger in sub.strangers]
            if not sub.pictures:
                faults.append(Fault("empty_class", name, str(sub.path)))
            remarks += [f"{where} in {sub.path} is left out" for where in sub.deeper]
        if part.files:
            remarks.append(f"not used: {listed(part.files)} in {part.path}, beside the class folders")
    for part in parts.values():
        known = {sub.name for sub in part.folders}
        if lacking := [label for label in classes if label not in known]:
            count = "1 class" if len(lacking) == 1 else f"{len(lacking)} classes"
            has = "has" if len(lacking) == 1 else "have"
            remarks.append(f"{count} of {name} {has} no folder in {part.name}: {listed(lacking)}")
    return DataTask(
        name=name,
        kind="folder",
        place=folder.path,
        counts={split: sum(counts[split] for counts in classes.values()) for split in parts},
        classes=dict(sorted(classes.items())),
        pictures=tuple(pictures),
        faults=tuple(faults),
        remarks=tuple(remarks),
    )


def _holds_classes(folder: Folder) -> bool:
    return not folder.pictures and any(sub.pictures for sub in folder.folders)


def _holds_tasks(folder: Folder) -> bool:
    return any(_holds_classes(sub) for sub in folder.folders)


def _advice(task: DataTask) -> list[str]:
    """What a user should know of a task's classes."""
    remarks = []
    few = [f"{label}: {task.train_of(label)}" for label in task.classes if 0 < task.train_of(label) < FEWEST]
    if few:
        label = "class" if len(few) == 1 else "classes"
        remarks.append(f"{len(few)} {label} of {task.name} with fewer than {FEWEST} images to train on: {listed(few)}")
    if task.classes and all(re.fullmatch(r"n\d{8}|[\W\d_]+", label) for label in task.classes):
        remarks.append(
            f"the classes of {task.name} are called by numbers ({listed(list(task.classes))}): the model reads their "
            "names, so give the words"
        )
    return remarks


def _overlaps(tasks: Sequence[DataTask]) -> list[Fault]:
    """Classes of the same name, whatever the case, in two tasks."""
    first: dict[str, str] = {}
    faults = []
    for task in tasks:
        for label in task.classes:
            other = first.setdefault(label.casefold(), task.name)
            if other != task.name:
                faults.append(Fault("overlap", task.name, label, f"in {other}, too"))
    return faults


def _check_names(task: DataTask) -> None:
    for name in (str(task.place), *task.classes, *map(str, (task.test, task.validation, task.images))):
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"look: names of folders must be UTF-8, got {os.fsencode(name)!r}. Rename it") from None


def _unexpected(folder: Folder, expected: str, remarks: Sequence[str], names: Sequence[str] = ()) -> ConfigError:
    odd = f", and {listed(list(names))} otherwise" if names else ""
    because = "".join(f"\n  {remark}" for remark in remarks)
    return ConfigError(f"look: {folder.path} must hold {expected}, got {folder.describe()}{odd}{because}")
