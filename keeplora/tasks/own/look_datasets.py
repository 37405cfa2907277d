"""Data as `datasets` reads it: parquet, arrow, csv and jsonl with a column of images."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeplora._messages import listed
from keeplora._untrusted import fault
from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.forms import is_talk
from keeplora.tasks.own.json_rows import json_rows
from keeplora.tasks.own.look_tree import IMAGES, DataTask, Folder, split_of

__all__ = ["dataset_tasks"]

_IMAGE_NAMES = ("image", "img", "picture", "photo", "file_name", "image_path", "path", "file")
_LABEL_NAMES = ("label", "labels", "class", "class_name", "fine_label", "category", "target", "species", "name")
_BINARY = (".parquet", ".arrow")
_TEXT = (".csv", ".jsonl")


@dataclass(frozen=True)
class _Table:
    """A file's rows, its columns, which of them is the image and which the class, and rows by class."""

    rows: int
    columns: tuple[str, ...]
    image: str
    label: str
    classes: Mapping[str, int]


def dataset_tasks(folder: Folder) -> tuple[list[DataTask], list[str]]:
    """The task that the tables of one folder are (none or one), and why other such files are none.

    A folder that `save_to_disk` wrote (``state.json``) is one; so is one whose ``metadata.csv`` names image files.

    Raises:
        ConfigError: a table that cannot be read, or one file of parquet or arrow without a column of images.
    """
    tables: dict[str, _Table] = {}
    others: list[str] = []
    for name in folder.files:
        kind = os.path.splitext(name)[1].lower()
        if kind not in (*_BINARY, *_TEXT):
            continue
        path = folder.path / name
        if not path.is_file():  # a pipe would be waited for
            others.append(f"{path} is no file that can be read")
            continue
        if kind in _BINARY:
            table = _binary_table(path)
            if table is None:
                return [_unseen(folder, [name for name in folder.files if name.lower().endswith(_BINARY)])], others
        else:
            try:
                table = _text_table(path)
            except ValueError as error:
                others.append(f"{path} must {error}")
                continue
            if table is None:
                continue
        if not table.image:
            others.append(f"{path} has no column of images, only {listed(table.columns, 8) or 'nothing'}")
            continue
        tables[name] = table
    if not tables and "state.json" in folder.files:
        raise ConfigError(f"look: {folder.path} must hold arrow files beside state.json, got {folder.describe()}")
    return ([_task(folder, tables)] if tables else []), others


def _task(folder: Folder, tables: Mapping[str, _Table]) -> DataTask:
    first = next(iter(tables.values()))
    splits: dict[str, list[str]] = {}
    for name in tables:
        splits.setdefault(split_of(Path(name).stem)[0] or "train", []).append(name)
    whole = folder.path.name or "data"
    if "train" not in splits:
        raise ConfigError(
            f"look: every task must have training data, got only {listed(list(tables))} in {folder.path}. "
            "Call the file train and its ending"
        )
    if any((table.columns, table.image) != (first.columns, first.image) for table in tables.values()):
        raise ConfigError(
            f"look: tables of one folder must have the same columns, got {listed(list(tables))} with others in "
            f"{folder.path}. Put each task into a folder of its own"
        )
    classes: dict[str, dict[str, int]] = {}
    for split, names in splits.items():
        for name in names:
            for label, count in tables[name].classes.items():
                by_split = classes.setdefault(label, {})
                by_split[split] = by_split.get(split, 0) + count
    single = all(len(names) == 1 for names in splits.values())
    saved = "state.json" in folder.files or any(name.lower().startswith("metadata.") for name in tables)
    files = {split: folder.path / names[0] for split, names in splits.items()} if single and not saved else {}
    remarks = [f"columns of {whole}: {listed(first.columns, 12)}"]
    if not first.label:
        remarks.append(f"no column of {whole} looks like classes: set label_column")
    if not single:
        remarks.append(f"`datasets` tells the splits of {whole} by the names of its files")
    return DataTask(
        name=whole,
        kind="dataset",
        place=files.get("train", folder.path),
        counts={split: sum(tables[name].rows for name in names) for split, names in splits.items()},
        classes=dict(sorted(classes.items())),
        test=files.get("test"),
        validation=files.get("validation"),
        # a column that names files is called "image" when `datasets` has read it
        image_column="image" if first.image == "file_name" else first.image,
        label_column=first.label,
        remarks=tuple(remarks),
    )


def _unseen(folder: Folder, names: Sequence[str]) -> DataTask:
    """Tables that nobody can look into here."""
    name = folder.path.name or "data"
    return DataTask(
        name=name,
        kind="dataset",
        place=folder.path,
        counts={},
        image_column="image",
        label_column="label",
        remarks=(
            f"{listed(names)} of {name} could not be looked into, and image_column and label_column are guessed: "
            "datasets is not installed. Run pip install 'keeplora[datasets]'",
        ),
    )


def _binary_table(path: Path) -> _Table | None:
    """A parquet or arrow file; None where `datasets` is not installed."""
    try:
        import pyarrow as pa  # optional, as datasets is, which brings it
        import pyarrow.parquet as pq
        from datasets import ClassLabel, Features, Image
    except ImportError:
        return None
    try:
        if path.suffix.lower() == ".parquet":
            schema, rows = pq.read_schema(path), pq.read_metadata(path).num_rows
        else:
            table = _arrow(pa, path)
            schema, rows = table.schema, table.num_rows
        features = Features.from_arrow_schema(schema)
        image = next((name for name, kind in features.items() if isinstance(kind, Image) or _holds_bytes(kind)), "")
        labels = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        label = labels[0] if labels else _named([name for name in features if name != image], _LABEL_NAMES)
        counts: Counter[Any] = Counter()
        if label:
            column = pq.read_table(path, columns=[label]) if path.suffix.lower() == ".parquet" else table
            counts.update(column[label].to_pylist())
        names = features[label].names if labels else None
    except (OSError, pa.ArrowException, ValueError) as error:
        raise ConfigError(f"look: {path} must be a table that can be read, got: {str(error)[:200]}") from error
    classes = {str(names[key]) if names and isinstance(key, int) and 0 <= key < len(names) else str(key): count
               for key, count in counts.items()}  # fmt: skip
    return _Table(rows, tuple(features), image, label, classes)


def _arrow(pa: Any, path: Path) -> Any:
    """An arrow file in either of the two formats; memory-mapped, images are not read."""
    with pa.memory_map(str(path)) as source:
        try:
            return pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_file(source).read_all()


def _holds_bytes(kind: Any) -> bool:
    """Whether a column without `datasets`' own types is what its images are stored as."""
    return isinstance(kind, dict) and set(kind) == {"bytes", "path"}


def _text_table(path: Path) -> _Table | None:
    """A csv or jsonl file; None for questions with answers, which are no table.

    Raises:
        ValueError: it cannot be read or parsed; the text goes after "must".
    """
    if path.suffix.lower() == ".csv":
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows: list[Mapping[str, Any]] = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"be csv that can be read, got: {error}") from error
    else:
        try:
            rows = [row for _, row in json_rows(path, finite=False) if isinstance(row, dict)]
        except (OSError, ValueError) as error:
            raise ValueError(fault(error)) from None
        if rows and is_talk(rows[0]):
            return None
    first = rows[0] if rows else {}
    columns = tuple(str(name) for name in first)
    image = _named([name for name in columns if str(first[name]).lower().endswith(IMAGES)], _IMAGE_NAMES, any_name=True)
    label = _named([name for name in columns if name != image], _LABEL_NAMES) if image else ""
    return _Table(len(rows), columns, image, label, Counter(str(row.get(label)) for row in rows) if label else {})


def _named(columns: Sequence[str], names: Sequence[str], *, any_name: bool = False) -> str:
    """The first of the usual names that a column has; any column's if ``any_name``; else nothing."""
    by_name = {column.lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), columns[0] if any_name and columns else "")
