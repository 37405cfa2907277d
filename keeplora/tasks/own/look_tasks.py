"""The tasks of a folder and of those in it, and why what else is there is none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

from keeplora._messages import listed
from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.look_classes import class_task
from keeplora.tasks.own.look_datasets import dataset_tasks
from keeplora.tasks.own.look_json import json_tasks
from keeplora.tasks.own.look_tree import DEPTH, DataTask, Folder, joined, renamed, split_named

__all__ = ["find_tasks"]

_EXPECTED = (
    "class/*.jpg, train/class/*.jpg and test/class/*.jpg, either of these in a folder for each task, JSON in LLaVA's "
    f"form, or what `datasets` reads with a column of images; at most {DEPTH} folders deep"
)


def find_tasks(tree: Folder) -> tuple[list[DataTask], list[str]]:
    """The tasks in a folder and below it, in alphabetical order of their places, and remarks on what is left out.

    Raises:
        ConfigError: there is no task.
    """
    found = _Found(tree)
    found.find_tables(tree, "")
    found.find_classes(tree, "")
    tasks, remarks = found.of_one_model()
    if tasks:
        return _with_own_names(sorted(tasks, key=lambda task: task.place.parts)), remarks
    if len(found.refused) == 1 and len(remarks) == 1:
        raise found.refused[0][1]
    because = "".join(f"\n  {remark}" for remark in remarks)
    raise ConfigError(f"look: {tree.path} must hold {_EXPECTED}, got {tree.describe()}{because}")


@dataclass
class _Found:
    """What is found below ``root``: tasks, what is said of files, and folders that are no tasks, with why.

    ``tables`` are the folders with tables, and those that these lie in; ``parts`` folders of a table's splits.
    """

    root: Folder
    tasks: list[DataTask] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    refused: list[tuple[Folder, ConfigError]] = field(default_factory=list)
    idle: list[tuple[Folder, str]] = field(default_factory=list)
    tables: set[Path] = field(default_factory=set)
    parts: set[Path] = field(default_factory=set)

    def find_tables(self, folder: Folder, name: str) -> bool:
        """Take the tables in a folder and below it; ``name`` is its path from the root, which its tasks have."""
        try:
            tables, remarks, parts = _tables(folder, self.root)
        except ConfigError as error:
            self.refused.append((folder, error))
            tables, remarks, parts = [], [], []
        self.remarks += remarks
        self.parts |= {folder.path / part for part in parts}
        for task in tables:
            self._take(folder, task, name if len(tables) == 1 else f"{name}-{task.name}" if name else "")
        there = bool(tables)
        if not any(task.kind == "dataset" for task in tables):  # of those the folders below hold the images
            subs = [sub for sub in folder.folders if sub.name not in parts]
            inner = [self.find_tables(sub, _joined(name, sub.name)) for sub in subs]
            there = there or any(inner)
        else:
            self.parts |= {sub.path for sub in folder.folders}
        if there:
            self.tables.add(folder.path)
        return there

    def find_classes(self, folder: Folder, name: str) -> None:
        """Take the tasks of class folders in a folder and below it."""
        if folder.path in self.parts:
            return
        if folder.path not in self.tables:
            try:
                task = class_task(folder)
            except ConfigError as error:
                self.refused.append((folder, error))
                return
            if task is not None:
                self._take(folder, task, name)
                return
        counts = len(self.tasks), len(self.refused)
        self.remarks += [f"{where} in {folder.path} is left out" for where in folder.deeper]
        for sub in folder.folders:
            self.find_classes(sub, _joined(name, sub.name))
        if folder is self.root or folder.path in self.tables:
            if folder.files and folder.path not in self.tables:
                self.remarks.append(f"not used: {listed(folder.files)} in {folder.path}")
        elif folder.empty:
            self.idle.append((folder, f"the folder {name} is empty, and left out"))
        elif (len(self.tasks), len(self.refused)) == counts:
            self.idle.append((folder, f"the folder {name} is left out: no class folders, but {folder.describe()}"))

    def _take(self, folder: Folder, task: DataTask, name: str) -> None:
        try:
            _check_names(task)
            if task.kind == "folder" and sum(any(counts.values()) for counts in task.classes.values()) < 2:
                raise ConfigError(
                    f"look: every task must have images of at least two classes, got {listed(list(task.classes))} "
                    f"alone in {task.place}"
                )
        except ConfigError as error:
            self.refused.append((folder, error))
        else:
            self.tasks.append(renamed(task, name) if name else task)

    def of_one_model(self) -> tuple[list[DataTask], list[str]]:
        """Tasks that one file can have: with answers, or with classes. Of both kinds the one with more samples."""
        answers = [task for task in self.tasks if task.kind == "json"]
        used = {picture for task in answers for picture in task.pictures}
        classes = [task for task in self.tasks if task.kind != "json" and used.isdisjoint(task.pictures)]
        aside = list(self.idle)
        aside += [(folder, f"left out: {str(error).removeprefix('look: ')}") for folder, error in self.refused]
        remarks = [text for folder, text in aside if used.isdisjoint(folder.all_pictures())] + self.remarks
        if not answers or not classes:
            return answers or classes, remarks
        more, less = sorted((answers, classes), key=_samples, reverse=True)
        kinds = ("answers", "classes") if more is answers else ("classes", "answers")
        remarks.append(
            f"left out: tasks of {kinds[1]} in {listed([str(task.place) for task in less])}, which a model for "
            f"{kinds[0]} does not learn. `keeplora init` makes a file of them where it is given their folder alone"
        )
        return more, remarks


def _joined(name: str, inner: str) -> str:
    return f"{name}-{inner}" if name else inner


def _samples(tasks: Sequence[DataTask]) -> int:
    return sum(sum(task.counts.values()) for task in tasks)


def _with_own_names(tasks: Sequence[DataTask]) -> list[DataTask]:
    """The tasks; the second of a name gets a number behind it."""
    named: dict[str, DataTask] = {}
    for task in tasks:
        choices = chain([task.name], (f"{task.name}-{number}" for number in count(2)))
        name = next(name for name in choices if name not in named)
        named[name] = task if name == task.name else renamed(task, name)
    return list(named.values())


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
            if len(inner) == 1 and split not in parts:
                remarks += more
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
        task = class_task(folder)
    except ConfigError:
        return False
    return task is not None and len(task.classes) > 1


def _check_names(task: DataTask) -> None:
    for name in (str(task.place), *task.classes, *map(str, (task.test, task.validation, task.images))):
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"look: names of folders must be UTF-8, got {os.fsencode(name)!r}. Rename it") from None
