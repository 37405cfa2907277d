"""Data sets that `datasets` reads: a saved one, or parquet, jsonl, json, csv and arrow files, and its image folders."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from keeplora._messages import listed
from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.config import OwnTasks, TaskSource

__all__ = ["open_rows"]

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}
_SPLITS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}


def open_rows(task: TaskSource, own: OwnTasks) -> dict[str, Any]:
    """A ``datasets.Dataset`` for each split that is there: ``train``, and perhaps ``validation`` and ``test``.

    Raises:
        ConfigError: `datasets` is not installed, there is nothing it reads, or no split is called train.
    """
    if find_spec("datasets") is None:
        raise ConfigError(
            f"open_workload: datasets must be installed for task {task.name!r}, got none. "
            "Run pip install 'keeplora[datasets]'"
        )
    given = {"train": task.dataset, "test": task.test, "validation": task.validation}
    rows: dict[str, Any] = {}
    for split, name in given.items():
        if not name:
            continue
        held = _read(task, own.path(name))
        if split == "train":
            rows.update(held)
        elif set(held) == {"train"}:  # a file alone has one split, which datasets calls so
            rows[split] = held["train"]
        else:
            raise ConfigError(
                f"open_workload: {split} of task {task.name!r} must be one file or split, got {listed(sorted(held))}"
            )
    if "train" not in rows:
        raise ConfigError(
            f"open_workload: dataset of task {task.name!r} must have a split train, got "
            f"{listed(sorted(rows)) or 'none'}"
        )
    return rows


def _read(task: TaskSource, path: Path) -> dict[str, Any]:
    import datasets  # optional, and slow to import

    if not path.exists():
        raise ConfigError(
            f"open_workload: dataset of task {task.name!r} must be a file or folder, got {str(path)!r}. Paths begin in "
            "the folder of the settings file"
        )
    try:
        if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
            held = datasets.load_from_disk(str(path))
        elif path.is_dir():
            held = datasets.load_dataset(str(path))
        elif path.suffix.lower() in BUILDERS:
            held = datasets.load_dataset(BUILDERS[path.suffix.lower()], data_files=str(path))
        else:
            raise ConfigError(
                f"open_workload: dataset of task {task.name!r} must be a folder or end in {', '.join(BUILDERS)}, got "
                f"{path.name!r}"
            )
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # of what is no data set, datasets raises anything
        raise ConfigError(f"open_workload: dataset of task {task.name!r} must be read by datasets: {error}") from error
    parts = dict(held) if isinstance(held, dict) else {"train": held}
    if strange := [name for name in parts if name not in _SPLITS]:
        raise ConfigError(
            f"open_workload: splits of task {task.name!r} must be train, validation or test, got {listed(strange)}"
        )
    return {_SPLITS[name]: part for name, part in parts.items()}
