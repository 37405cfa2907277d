"""Image tasks as they lie on a disk: class folders, and what `datasets` reads. Nothing is decoded here."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from keeplora._messages import listed, suggest
from keeplora.methods.settings import ConfigError
from keeplora.tasks import field
from keeplora.tasks.field import ArrayImage
from keeplora.tasks.own.broken import broken
from keeplora.tasks.own.config import OwnTasks, TaskSource
from keeplora.tasks.own.faults import Faults

__all__ = ["FileImage", "ImageItem", "ImageSet", "RowImage", "read_all", "read_images"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
PASSED_OVER = ("thumbs.db",)
"""Files that are neither images nor anybody's data; in lower case."""
SPLITS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
"""Our names of the splits, and the folders' or `datasets`' names."""


class ImageItem(Protocol):
    """One image: where it is, what tells it from another in its place, and its bytes."""

    @property
    def name(self) -> str: ...

    @property
    def stamp(self) -> str: ...

    def read(self) -> bytes: ...


@dataclass(frozen=True)
class FileImage:
    """A file below a task's folder. ``name`` is its path from there."""

    root: Path
    name: str

    @property
    def stamp(self) -> str:
        """When to decode it again: its size, and when it was written."""
        return _written(self.root / self.name)

    def read(self) -> bytes:
        return (self.root / self.name).read_bytes()


@dataclass(frozen=True)
class RowImage:
    """A row of a data set; ``path`` is the file it names, if its column holds paths, from ``root`` on."""

    root: Path
    rows: Any
    column: str
    index: int
    split: str
    path: str = ""

    @property
    def name(self) -> str:
        return f"{self.split}[{self.index}]{': ' if self.path else ''}{self.path}"

    @property
    def stamp(self) -> str:
        return f"{self.rows._fingerprint} {_written(Path(self.root, self.path)) if self.path else ''}"

    def read(self) -> bytes:
        value = self.rows[self.index][self.column]
        if value is None:
            raise FileNotFoundError(f"no image in row {self.index} of {self.split}")
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        return Path(self.root, value["path"]).read_bytes()


def _written(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:  # told as a fault where it is read
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


@dataclass(frozen=True)
class HeldImage:
    """An image of a data set of the field that keeps its images in arrays."""

    source: ArrayImage
    split: str

    @property
    def name(self) -> str:
        return f"{self.split}[{self.source.index}]"

    @property
    def stamp(self) -> str:
        return str(zlib.crc32(np.ascontiguousarray(self.source.array[self.source.index]).tobytes()))

    def read(self) -> bytes:
        file = io.BytesIO()
        self.source.open().save(file, "PNG", compress_level=0)
        return file.getvalue()


@dataclass(frozen=True)
class ImageSet:
    """The images of one task. ``places[split]`` are those that the data itself assigns to a split."""

    name: str
    classes: tuple[str, ...]
    items: tuple[ImageItem, ...]
    labels: tuple[int, ...]
    places: dict[str, list[int]]
    template: str
    templates: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_all(own: OwnTasks, faults: Faults) -> list[ImageSet]:
    """List the images of all tasks, the witness's last: a user's own, or those of a benchmark of the field.

    Raises:
        ConfigError: data is missing, or not what it is said to be.
    """
    if not own.benchmark:
        return [read_images(task, own, faults) for task in own.all]
    data = own.data
    root = own.data_root
    found = field.read_images(root, own.benchmark, data.order, shots=data.shots, seed=data.shots_seed)
    return [_of_field(one, root) for one in found]


def _of_field(found: field.ImageSet, root: Path) -> ImageSet:
    items: list[ImageItem] = []
    labels: list[int] = []
    places: dict[str, list[int]] = {}
    known: dict[Any, int] = {}  # with replacement, an image may be drawn twice
    for split, pairs in (("train", found.train), ("validation", found.validation), ("test", found.test)):
        places[split] = []
        for source, label in pairs:
            key = source if isinstance(source, field.FileImage) else (split, source.index)  # type: ignore[attr-defined]
            if key not in known:
                known[key] = len(items)
                items.append(
                    FileImage(root, source.path.relative_to(root).as_posix())
                    if isinstance(source, field.FileImage)
                    else HeldImage(cast(ArrayImage, source), split)
                )
                labels.append(label)
            places[split].append(known[key])
    return ImageSet(
        found.name, found.classes, tuple(items), tuple(labels), places, found.template, found.templates, found.notes
    )


def read_images(task: TaskSource, own: OwnTasks, faults: Faults) -> ImageSet:
    """List the images of a task of classes.

    Raises:
        ConfigError: there is no such folder, it holds no classes, or a split without training data.
    """
    reader: Callable[[TaskSource, OwnTasks, Faults], tuple[dict[str, list[tuple[ImageItem, str]]], Sequence[str]]]
    reader = _folder if task.kind == "folder" else _dataset
    by_split, names = reader(task, own, faults)
    classes = tuple(names)
    if len(classes) < 2:
        raise ConfigError(
            f"open_workload: a task must have at least two classes, got {listed(classes) or 'none'} in task "
            f"{task.name!r} ({getattr(task, task.kind)})"
        )
    if strange := [f"{name!r} ({why})" for name in classes if (why := broken(name))]:
        raise ConfigError(
            f"open_workload: names of classes must be texts that can be read, got {listed(strange)} in task "
            f"{task.name!r}"
        )
    number = {name: place for place, name in enumerate(classes)}
    items: list[ImageItem] = []
    labels: list[int] = []
    places: dict[str, list[int]] = {}
    for split, pairs in by_split.items():
        places[split] = list(range(len(items), len(items) + len(pairs)))
        items += [item for item, _ in pairs]
        labels += [number[name] for _, name in pairs]
    return ImageSet(
        task.name, classes, tuple(items), tuple(labels), places, task.template or own.data.template, own.data.templates
    )


def _folder(task: TaskSource, own: OwnTasks, faults: Faults) -> Any:
    root = own.path(task.folder)
    if not root.is_dir():
        raise ConfigError(
            f"open_workload: folder of task {task.name!r} must be a folder, got {str(root)!r}. Paths begin in the "
            "folder of the settings file"
        )
    inside = {entry.name.lower(): entry.name for entry in _entries(root) if entry.is_dir()}
    named = {split: inside[name] for split, names in SPLITS.items() for name in names if name in inside}
    if "train" in named and not _has_folders(root / named["train"]):
        if set(named.values()) == set(inside.values()):
            raise ConfigError(
                f"open_workload: folders of splits must hold class folders, got files alone in {root / named['train']} "
                f"of task {task.name!r}. Expected is train/class/*.jpg"
            )
        named = {}  # a class is called "train"
    if "train" not in named:
        named = {}  # a class may be called "test"
    elif others := sorted(set(inside.values()) - set(named.values())):
        raise ConfigError(
            f"open_workload: beside {named['train']!r} folder of task {task.name!r} must hold splits alone, got "
            f"{listed(others)}. Move them, or give each its own task"
        )
    parts = {split: root / name for split, name in named.items()} or {"train": root}
    found = {split: dict(_classes(part, faults, task.name)) for split, part in parts.items()}
    classes = sorted(set().union(*found.values()))
    by_split: dict[str, list[tuple[ImageItem, str]]] = {}
    for split, held in found.items():
        by_split[split] = []
        for name in classes:
            files = _images(held[name], faults, task.name) if name in held else []
            if not files and (split == "train" or name in held):
                where = held.get(name, parts[split] / name)
                if not faults.add("empty_class", task.name, where.relative_to(root), f"in {split}"):
                    continue
            by_split[split] += [(FileImage(root, path.relative_to(root).as_posix()), name) for path in files]
    if faults.data.action("empty_class") == "skip":
        filled = {name for _, name in by_split["train"]}
        for split in by_split:
            by_split[split] = [pair for pair in by_split[split] if pair[1] in filled]
        classes = [name for name in classes if name in filled]
    return by_split, classes


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted, without hidden files and what macOS puts into archives.

    Raises:
        ConfigError: a name is no UTF-8, or a link leads back up.
    """
    with os.scandir(folder) as scanned:
        entries = [entry for entry in scanned if entry.name[0] != "." and entry.name != "__MACOSX"]
    above = {os.path.realpath(one) for one in (folder, *folder.parents)}
    for entry in entries:
        if broken(entry.name):
            raise ConfigError(f"open_workload: names of files must be UTF-8, got {entry.name!r} in {folder}. Rename it")
        if entry.is_symlink() and entry.is_dir() and os.path.realpath(entry.path) in above:
            raise ConfigError(f"open_workload: links must not lead back up, got {entry.path}. Take it away")
    return sorted(entries, key=lambda entry: entry.name)


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() for entry in _entries(folder))


def _classes(folder: Path, faults: Faults, task: str) -> Iterator[tuple[str, Path]]:
    for entry in _entries(folder):
        if entry.is_dir():
            yield entry.name, Path(entry.path)
        elif entry.name.lower().endswith(EXTENSIONS):
            faults.add("loose", task, f"{folder.name}/{entry.name}")


def _images(folder: Path, faults: Faults, task: str) -> list[Path]:
    """Image files at any depth below a class folder, sorted by path."""
    result: list[Path] = []
    for entry in _entries(folder):
        path = Path(entry.path)
        if entry.is_dir():
            result += _images(path, faults, task)
        elif path.suffix.lower() in EXTENSIONS:
            result.append(path)  # also where it is a link that leads nowhere: a fault when it is read
        elif path.name.lower() not in PASSED_OVER:
            faults.add("not_image", task, f"{folder.name}/{path.name}")
    return result


def _dataset(task: TaskSource, own: OwnTasks, faults: Faults) -> Any:
    from keeplora.tasks.own.rows import open_rows

    rows = open_rows(task, own)
    place = own.path(task.dataset)
    root = place if place.is_dir() else place.parent
    train = rows["train"]
    image = task.image_column or _only(task, train, "image_column", lambda kind: kind == "Image")
    label = task.label_column or _only(
        task, train, "label_column", lambda kind: kind in ("ClassLabel", "string", "large_string"), image
    )
    for column, setting in ((image, "image_column"), (label, "label_column")):
        if any(column not in part.column_names for part in rows.values()):
            raise ConfigError(
                f"open_workload: {setting} of task {task.name!r} must be a column of {task.dataset}, got {column!r}"
                f"{suggest(column, train.column_names, listing=True)}"
            )
    names = getattr(train.features[label], "names", None)
    by_split: dict[str, list[tuple[ImageItem, str]]] = {}
    for split, part in rows.items():
        raw = part.cast_column(image, _undecoded())
        held_paths = "string" in str(getattr(part.features[image], "dtype", ""))
        paths = [str(path or "") for path in part[image]] if held_paths else [""] * len(part)
        by_split[split] = [
            (RowImage(root, raw, image, index, split, paths[index]), value)
            for index, value in enumerate(_labels(task, part, label, split))
        ]
    held = {name for _, name in by_split["train"]}
    if strange := sorted({name for pairs in by_split.values() for _, name in pairs} - held):
        raise ConfigError(
            f"open_workload: every class of task {task.name!r} must have training images, got none of {listed(strange)}"
        )
    return by_split, [name for name in names if name in held] if names else sorted(held)


def _labels(task: TaskSource, part: Any, label: str, split: str) -> list[str]:
    """Class names of the rows; numbers are read by this part's own names, which may stand in another order."""
    own_names = getattr(part.features[label], "names", None)
    values = part[label]
    wrong = [
        place for place, value in enumerate(values) if value is None or (own_names and not 0 <= value < len(own_names))
    ]
    if wrong:
        raise ConfigError(
            f"open_workload: every row of task {task.name!r} must have a label, got {values[wrong[0]]!r} in "
            f"{len(wrong)} of {len(values)} rows of {split}, row {wrong[0]} first. "
            "Take them out, or give the split that has labels"
        )
    return [str(own_names[value]) if own_names else str(value) for value in values]


def _undecoded() -> Any:
    from datasets import Image

    return Image(decode=False)


def _only(task: TaskSource, rows: Any, setting: str, wanted: Callable[[str], bool], besides: str = "") -> str:
    """The one column of a kind; ``ConfigError`` where there are none or several."""
    kinds: dict[str, str] = {
        name: type(feature).__name__
        if not hasattr(feature, "dtype") or type(feature).__name__ != "Value"
        else feature.dtype
        for name, feature in rows.features.items()
    }
    those = [name for name, kind in kinds.items() if wanted(kind) and name != besides]
    labels = [name for name in those if kinds[name] == "ClassLabel"]
    if len(labels) == 1:
        return labels[0]
    if len(those) != 1:
        columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise ConfigError(
            f"open_workload: {setting} of task {task.name!r} must be given where not exactly one column suits, got "
            f"{listed(those) or 'none'}. Columns: {columns}"
        )
    return those[0]
