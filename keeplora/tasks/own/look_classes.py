"""Class folders of images, with or without folders for the splits: one task, as a run reads it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import NoReturn

from keeplora._messages import listed
from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.faults import Fault
from keeplora.tasks.own.look_tree import DataTask, Folder, split_named

__all__ = ["class_task"]


def class_task(folder: Folder) -> DataTask | None:
    """The task whose class folders these are. None: it is no task of its own, but folders in it may be.

    Images at any depth below a class folder are of that class. Where a folder could be a class with folders of images
    or a task with classes and images beside them, the reading counts in which more images are where they belong.

    Raises:
        ConfigError: folders or images that a run would refuse.
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
    as_classes = sum(len(sub.pictures) for sub in direct)
    as_tasks = sum(len(inner.pictures) for sub in folder.folders if _classes(sub) > 1 for inner in sub.folders)
    if as_tasks > as_classes:
        return None
    return _made(folder, {"train": folder})


def _split_task(folder: Folder, splits: Mapping[str, str]) -> DataTask:
    others = [sub.name for sub in folder.folders if sub.name not in splits]
    if others:
        _refuse(folder, f"splits alone beside {listed(list(splits))}", f"{listed(others)} otherwise")
    parts: dict[str, Folder] = {}
    for sub in folder.folders:
        if not sub.has_pictures():
            continue
        if splits[sub.name] in parts:
            raise ConfigError(
                f"look: every split must have one folder, got {parts[splits[sub.name]].name} and {sub.name} in "
                f"{folder.path}"
            )
        if not sub.folders:
            _refuse(sub, "class folders with images")
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
            inside = list(_below(sub))
            files = [os.path.join(each.path, picture) for each in inside for picture in each.pictures]
            classes.setdefault(sub.name, dict.fromkeys(parts, 0))[split] = len(files)
            pictures += files
            faults += [Fault("not_image", name, str(each.path / odd)) for each in inside for odd in each.strangers]
            if not files:
                faults.append(Fault("empty_class", name, str(sub.path)))
            if deep := [each.name for each in inside[1:] if each.pictures]:
                remarks.append(f"images in folders of {sub.path} are taken as {sub.name}: {listed(deep)}")
            remarks += [f"{where} in {each.path} is left out" for each in inside for where in each.deeper]
        faults += [Fault("loose", name, str(part.path / picture)) for picture in part.pictures]
        remarks += [f"{where} in {part.path} is left out" for where in part.deeper]
        if part.strangers:
            remarks.append(f"not used: {listed(part.strangers)} in {part.path}, beside the class folders")
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


def _below(folder: Folder) -> Iterator[Folder]:
    """The folder, and all in it."""
    yield folder
    for inner in folder.folders:
        yield from _below(inner)


def _classes(folder: Folder) -> int:
    """Class folders, with splits or without, if this is a task."""
    splits = [sub for sub in folder.folders if split_named(sub.name) is not None]
    return max(sum(bool(sub.pictures) for sub in each.folders) for each in (folder, *splits))


def _holds_classes(folder: Folder) -> bool:
    return any(sub.pictures for sub in folder.folders)


def _holds_tasks(folder: Folder) -> bool:
    return any(_holds_classes(sub) for sub in folder.folders)


def _refuse(folder: Folder, expected: str, odd: str = "") -> NoReturn:
    raise ConfigError(f"look: {folder.path} must hold {expected}, got {folder.describe()}{odd and f', and {odd}'}")
