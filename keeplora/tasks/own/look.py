"""A look at a folder of data: which tasks it holds, how many images by class and split, and what is wrong with them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from keeplora._messages import listed
from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.faults import Fault
from keeplora.tasks.own.look_headers import MOST, look_at_headers
from keeplora.tasks.own.look_tasks import find_tasks
from keeplora.tasks.own.look_tree import DataFolder, DataTask, read_folder

__all__ = ["FEWEST", "look"]

FEWEST = 3
"""Images that every class should have: one for training, one for choices, one for testing."""


def look(folder: str | os.PathLike[str], *, most: int = MOST) -> DataFolder:
    """What a folder holds, up to four folders deep; hidden files are passed over, links followed. Nothing is written.

    Recognised are class folders of images, with or without folders for the splits, for one task or for one in each
    folder, at any depth; JSON and JSONL of questions and answers, by content; and tables with a column of images. What
    is none of these is left out, and a remark says why.

    Args:
        most: Image files of which the header is opened; of more, every k-th is.

    Raises:
        ConfigError: nothing in the folder is recognised; the message says what is there, and why it is no task.
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
    tasks, remarks = find_tasks(read_folder(path))
    tasks = [replace(task, remarks=(*task.remarks, *_advice(task))) for task in tasks]
    pictures = [(task.name, picture) for task in tasks for picture in task.pictures]
    try:
        headers, looked_at = look_at_headers(pictures, most)
    except ImportError:
        headers, looked_at = [], 0
        remarks.append("no image was opened: Pillow is not installed. Run pip install 'keeplora[datasets]'")
    faults = [*headers, *(fault for task in tasks for fault in task.faults), *_overlaps(tasks)]
    return DataFolder(path, tuple(tasks), tuple(faults), looked_at, len(pictures), tuple(dict.fromkeys(remarks)))


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
