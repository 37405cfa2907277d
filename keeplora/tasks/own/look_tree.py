"""What a folder of data is, as dataclasses, and how it is read: names alone, to a certain depth."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path

from keeplora._messages import listed
from keeplora.tasks.own.faults import Fault
from keeplora.tasks.own.images import EXTENSIONS, PASSED_OVER, SPLITS

__all__ = [
    "DEPTH",
    "IMAGES",
    "DataFolder",
    "DataTask",
    "Folder",
    "joined",
    "read_folder",
    "renamed",
    "split_named",
    "split_of",
]

DEPTH = 4
"""Folders deep that is looked: task, split, class, and the files."""
IMAGES = EXTENSIONS
_SPLITS = {name: split for split, names in SPLITS.items() for name in names}
_WORDS = "|".join(sorted(_SPLITS, key=len, reverse=True))


@dataclass(frozen=True)
class DataTask:
    """One task as it lies on the disk.

    Args:
        kind: ``"folder"``, ``"dataset"`` or ``"json"``: the setting that says where it is.
        place: that path.
        counts: Images or samples by split (``"train"``, ``"validation"``, ``"test"``), as they are given.
        classes: Class, then images by split. Empty where there are none, or nobody has counted.
        test: Test data beside ``place``.
        validation: those for choices.
        images: where the paths of ``json`` begin.
        image_column: Of a ``dataset``.
        label_column: too.
        pictures: Image files, for a look at their headers.
        faults: What is not as it should be, as far as names and texts tell.
        remarks: Sentences for the user.
    """

    name: str
    kind: str
    place: Path
    counts: Mapping[str, int]
    classes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    test: Path | None = None
    validation: Path | None = None
    images: Path | None = None
    image_column: str = ""
    label_column: str = ""
    pictures: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    remarks: tuple[str, ...] = ()

    def train_of(self, name: str) -> int:
        """Images of a class that are there for training, before anything is kept for testing."""
        return self.classes[name].get("train", 0)


@dataclass(frozen=True)
class DataFolder:
    """All that was found. ``looked_at`` of ``pictures`` image files were opened."""

    folder: Path
    tasks: tuple[DataTask, ...]
    faults: tuple[Fault, ...]
    looked_at: int
    pictures: int
    remarks: tuple[str, ...] = ()

    @property
    def answers(self) -> bool:
        """Whether the tasks are questions and answers; else they are classes of images."""
        return self.tasks[0].kind == "json"


@dataclass(frozen=True)
class Folder:
    """Names in a folder, sorted; hidden ones are left out. ``deeper``: folders that were not entered, and why."""

    path: Path
    files: tuple[str, ...]
    folders: tuple[Folder, ...]
    deeper: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def pictures(self) -> tuple[str, ...]:
        """Files with an image's extension."""
        return tuple(name for name in self.files if name.lower().endswith(IMAGES))

    @property
    def strangers(self) -> tuple[str, ...]:
        """Files without one, but for those that a file system leaves behind."""
        return tuple(name for name in self.files if not name.lower().endswith((*IMAGES, *PASSED_OVER)))

    @property
    def empty(self) -> bool:
        """Whether no file is in it, however deep."""
        return not self.files and not self.deeper and all(inner.empty for inner in self.folders)

    def has_pictures(self) -> bool:
        """Whether an image is in it, however deep."""
        return next(self.all_pictures(), None) is not None

    def all_pictures(self) -> Iterator[str]:
        """Paths of all images in it, however deep."""
        yield from (os.path.join(self.path, name) for name in self.pictures)
        for inner in self.folders:
            yield from inner.all_pictures()

    def describe(self) -> str:
        """What is in it, in a few words.

        >>> Folder(Path("a"), ("b.txt", "c.txt", "d"), (Folder(Path("a/e"), (), ()),)).describe()
        '1 folder (e: nothing), 2 .txt files (b.txt, c.txt), 1 file without extension (d)'
        """
        parts = []
        if self.folders:
            inner = [f"{each.name}: {each._inside()}" for each in self.folders]
            parts.append(f"{len(inner)} folder{_s(inner)} ({listed(inner)})")
        by_kind: dict[str, list[str]] = {}
        for name in self.files:
            by_kind.setdefault(os.path.splitext(name)[1].lower(), []).append(name)
        for kind, names in sorted(by_kind.items(), reverse=True):
            label = f"{kind} file{_s(names)}" if kind else f"file{_s(names)} without extension"
            parts.append(f"{len(names)} {label} ({listed(names)})")
        return ", ".join([*parts, *self.deeper]) or "nothing"

    def _inside(self) -> str:
        kinds = Counter(os.path.splitext(name)[1].lower() or "other" for name in self.files)
        parts = [f"{count} {kind}" for kind, count in kinds.most_common(3)]
        if self.folders:
            parts.append(f"{len(self.folders)} folder{_s(self.folders)}")
        return " and ".join([*parts, *self.deeper]) or "nothing"


def _s(entries: Sized) -> str:
    return "" if len(entries) == 1 else "s"


def read_folder(path: Path, depth: int = DEPTH) -> Folder:
    """The names in a folder and in those below it. A link is followed, but never back to where it lies in.

    Raises:
        OSError: a folder that cannot be read.
    """
    return _read(path, depth, (os.path.realpath(path),))


def _read(path: Path, depth: int, above: tuple[str, ...]) -> Folder:
    files, folders, deeper = [], [], []
    with os.scandir(path) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if not entry.is_dir():
            files.append(entry.name)
            continue
        real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
        if real in above:
            deeper.append(f"{entry.name} (a link that leads back up)")
        elif depth == 1:
            deeper.append(f"{entry.name} (a folder more than {DEPTH} deep)")
        else:
            folders.append(_read(path / entry.name, depth - 1, (*above, real)))
    return Folder(path, tuple(files), tuple(folders), tuple(deeper))


def split_of(stem: str) -> tuple[str | None, str]:
    """The split that a name speaks of, and the rest of the name.

    >>> split_of("train"), split_of("Val-00000-of-00002"), split_of("birds_test"), split_of("trainer")
    (('train', ''), ('validation', ''), ('test', 'birds'), (None, 'trainer'))
    """
    if match := re.fullmatch(rf"({_WORDS})(?:[\W_].*)?", stem, re.IGNORECASE):
        return _SPLITS[match[1].lower()], ""
    if match := re.fullmatch(rf"(.+?)[\W_]+({_WORDS})", stem, re.IGNORECASE):
        return _SPLITS[match[2].lower()], match[1]
    return None, stem


def split_named(folder: str) -> str | None:
    """The split that a folder is called after, wholly.

    >>> split_named("Train"), split_named("valid"), split_named("train images")
    ('train', 'validation', None)
    """
    return _SPLITS.get(folder.lower())


def joined(name: str, parts: Mapping[str, DataTask]) -> DataTask:
    """One task of those that were found in folders called after splits; there is one of ``"train"``."""
    first = parts["train"]
    classes: dict[str, dict[str, int]] = {}
    for split, part in parts.items():
        for label, counts in part.classes.items():
            classes.setdefault(label, {})[split] = sum(counts.values())
    return replace(
        renamed(first, name),
        counts={split: sum(part.counts.values()) for split, part in parts.items()},
        classes=classes,
        test=parts["test"].place if "test" in parts else None,
        validation=parts["validation"].place if "validation" in parts else None,
        pictures=tuple(picture for part in parts.values() for picture in part.pictures),
        faults=tuple(fault for part in parts.values() for fault in renamed(part, name).faults),
        remarks=tuple(dict.fromkeys(remark for part in parts.values() for remark in part.remarks)),
    )


def renamed(task: DataTask, name: str) -> DataTask:
    """The same task under another name."""
    return replace(task, name=name, faults=tuple(replace(fault, task=name) for fault in task.faults))
