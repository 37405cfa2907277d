"""What a run leaves on disk: its state after every task, and its result at the end."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sized
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from keeplora._files import write_json
from keeplora._untrusted import MOST_JSON, fault, parse_json, read_bytes
from keeplora._version import __version__
from keeplora.methods.settings import ConfigError
from keeplora.methods.state import State, StateError, has_state, read_state, write_state
from keeplora.train.config import RunConfig
from keeplora.train.items import unpacked

SCHEMA = 2
"""Of a result, and of a run between two tasks."""
RESULT_FILE = "result.json"
CONFIG_FILE = "config.json"
_NEWER = {"reused"}
"""Fields that came later; what runs without them measured is their default."""
AGAIN = "Move it elsewhere; the command that made the folder then runs that again."
"""What can be done about a result that cannot be read: nothing is thrown away."""


@dataclass
class RunRecord:
    """What is measured in one run of one method with one seed. Accuracies are fractions.

    ``accuracy[i][j]`` is task j after task i; ``witness[i]`` the task that is never trained. ``inference_seconds`` are
    those of one evaluation at the end of the run and of the same by the untouched pretrained model. ``earlier_data``
    names what the method looked at again of earlier tasks: "training" data, "validation" data.

    ``reused[i]`` counts the evaluations after task i that were looked up (``evaluated``): their time is not in
    ``evaluate_seconds``. Where a run is evaluated on both splits, ``validation[i][j]`` is the accuracy there (None
    where neither Transfer nor Last needs it), ``correct[i][j]`` tells which of the ``items[j]`` test items were
    right (``items``). ``failed`` says what went wrong where it ended before its time because its numbers were
    no longer finite.
    """

    label: str
    seed: int
    tasks: list[str]
    accuracy: list[list[float]] = field(default_factory=list)
    witness: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)
    switch_seconds: list[float] = field(default_factory=list)
    evaluate_seconds: list[float] = field(default_factory=list)
    certificates: list[dict[str, Any] | None] = field(default_factory=list)
    capacity: list[dict[str, Any]] = field(default_factory=list)
    trainable: list[int] = field(default_factory=list)
    steps: int = 0
    peak_bytes: int = 0
    inference_seconds: list[float] = field(default_factory=list)
    earlier_data: list[str] = field(default_factory=list)
    validation: list[list[float | None]] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    correct: list[list[str]] = field(default_factory=list)
    failed: str = ""
    reused: list[int] = field(default_factory=list)

    def right(self, after: int, task: int) -> NDArray[np.bool_]:
        """Which test items of ``task`` were right after the task ``after``."""
        return unpacked(self.correct[after][task], self.items[task])

    @property
    def finished_tasks(self) -> int:
        """Tasks that are learned, merged and evaluated."""
        return len(self.accuracy)

    @property
    def done(self) -> bool:
        """Whether every task is finished."""
        return self.finished_tasks == len(self.tasks)

    def problem(self) -> str:
        """What must be otherwise, where the figures of a finished task are missing or are no numbers; else empty."""
        if nameless := [name for name in self.tasks if not isinstance(name, str)]:
            return f"tasks must be names, got {nameless[0]!r}"
        tasks = self.finished_tasks
        per_task: dict[str, Sized] = {
            "accuracy": self.accuracy, "loss": self.loss, "train_seconds": self.train_seconds,
            "switch_seconds": self.switch_seconds, "evaluate_seconds": self.evaluate_seconds,
            "certificates": self.certificates,
        }  # fmt: skip
        for name, values in per_task.items():
            if len(values) != tasks:
                return f"{name} must have one entry for each of {tasks} finished tasks, got {len(values)}"
        if len(self.reused) not in (0, tasks) or not all(_is_count(number) for number in self.reused):
            return f"reused must have a count for each of {tasks} finished tasks, got {self.reused}"
        if len(self.witness) not in (0, tasks):
            return f"witness must have one entry for each of {tasks} finished tasks or none, got {len(self.witness)}"
        for task, row in enumerate(self.accuracy):
            if len(row) != len(self.tasks):
                return f"accuracy must have {len(self.tasks)} values after every task, got {len(row)} after {task + 1}"
        fractions = {"accuracy": [value for row in self.accuracy for value in row], "witness": self.witness}
        for name, values in fractions.items():
            if strange := [value for value in values if not (_is_number(value) and 0 <= value <= 1)]:
                return f"{name} must be from 0 to 1, got {strange[0]!r}"
        for name in ("loss", "train_seconds", "switch_seconds", "evaluate_seconds", "inference_seconds"):
            if strange := [value for value in getattr(self, name) if not _is_number(value)]:
                return f"{name} must be finite, got {strange[0]!r}"
        return self._items_problem() if self.correct or self.validation else ""

    def _items_problem(self) -> str:
        """As ``problem``, of a run that is evaluated on both splits."""
        tasks, finished = len(self.tasks), self.finished_tasks
        if len(self.items) != tasks or not all(isinstance(n, int) and n > 1 for n in self.items):
            return f"items must tell of at least two test items in each of {tasks} tasks, got {self.items}"
        for name, rows in (("validation", self.validation), ("correct", self.correct)):
            if [len(row) for row in rows] != [tasks] * finished:
                return f"{name} must have {tasks} values after each of {finished} finished tasks, got {rows}"
        shares = [value for row in self.validation for value in row if value is not None]
        if strange := [value for value in shares if not (_is_number(value) and 0 <= value <= 1)]:
            return f"validation must be from 0 to 1, got {strange[0]!r}"
        for after, row in enumerate(self.accuracy):
            for task, share in enumerate(row):
                try:
                    right = int(self.right(after, task).sum())
                except ValueError as error:
                    return f"correct must be the test items of {self.tasks[task]} ({error})"
                if abs(right / self.items[task] - share) > 1e-9:
                    return f"correct must be {share:.1%} of {self.tasks[task]}, got {right} of {self.items[task]}"
        return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def certificate_figures(value: Any) -> dict[str, Any]:
    """The figures of a method's report, as JSON takes them."""
    names = ("leak_after_rounding", "leak", "orthogonality", "captured")
    figures = {name: getattr(value, name, None) for name in names}
    layers = [_plain(layer) for layer in getattr(value, "layers", [])]
    return {**figures, "layers": layers, "text": str(value)}


def _plain(row: Any) -> dict[str, Any]:
    """A dataclass, named tuple or mapping as a dict."""
    if is_dataclass(row) and not isinstance(row, type):
        return asdict(row)
    if hasattr(row, "_asdict"):
        return dict(row._asdict())
    return dict(row)


def versions() -> dict[str, str]:
    """What decides numbers besides the settings."""
    return {"keeplora": __version__, "torch": str(torch.__version__)}


def run_folder(out: str | os.PathLike[str], label: str, seed: int) -> Path:
    """Where one run keeps its files."""
    return Path(out) / "runs" / label / f"seed-{seed}"


def save_progress(folder: Path, record: RunRecord, method_state: State, identity: Mapping[str, Any]) -> None:
    """Save a run between two tasks, atomically."""
    meta = {**_written(record, identity), "method": method_state.meta}
    write_state(folder / "state", replace(method_state, meta=meta))


def load_progress(folder: Path, identity: Mapping[str, Any]) -> tuple[RunRecord, State] | None:
    """The state of an interrupted run, or None when there is none.

    Raises:
        ConfigError: it was made with other settings.
        StateError: it is damaged, or of another schema.
    """
    if not has_state(folder / "state"):
        return None
    saved = read_state(folder / "state")
    record = _read("load_progress", saved.meta, identity, folder / "state")
    method = saved.meta.get("method")
    if not isinstance(method, dict):
        raise StateError(f"load_progress: {folder / 'state'} must hold a method's state, got {method!r}. {AGAIN}")
    return record, State(tensors=saved.tensors, meta=method)


def save_result(folder: Path, record: RunRecord, identity: Mapping[str, Any], *, keep_state: bool) -> None:
    """Save a finished run; the state it would resume from goes, unless it is wanted."""
    write_json(folder / RESULT_FILE, _written(record, identity))
    if not keep_state:
        shutil.rmtree(folder / "state", ignore_errors=True)


def load_result(folder: Path, identity: Mapping[str, Any]) -> RunRecord | None:
    """The result of a finished run, or None.

    Raises:
        ConfigError: it was made with other settings.
        StateError: it cannot be read, is damaged, or of another schema.
    """
    file = folder / RESULT_FILE
    if not os.path.lexists(file):
        return None
    record = _read("load_result", _parsed("load_result", file, AGAIN), identity, file)
    if not record.done and not record.failed:
        raise StateError(
            f"load_result: {file} must hold all {len(record.tasks)} tasks, got {record.finished_tasks}. {AGAIN}"
        )
    return record


def recorded_data(config: RunConfig, source: str | None) -> str | None:
    """The fingerprint of the data that the run folder records, if they are still made of ``source``; else None."""
    file = Path(config.out) / CONFIG_FILE
    if source is None or not os.path.lexists(file):
        return None
    previous = _parsed("claim_folder", file, "Use another folder.")
    if not isinstance(previous, Mapping) or previous.get("source") != source:
        return None
    data = previous.get("data")
    return data if isinstance(data, str) else None


def claim_folder(config: RunConfig, data: str, *, source: str | None = None, accept_versions: bool = False) -> None:
    """Write ``config.json`` into the run folder; refuse a folder that holds runs with other settings.

    ``data`` is the workload's fingerprint: results on other data must not stand in one table either. Nor must those of
    another keeplora or torch, unless ``accept_versions``; the file names all that have run here, every result its own.
    ``source`` is a hash of what the data are made of: while it stays, [`recorded_data`][] are those of ``data``.

    More seeds or methods are welcome: their runs stand beside the finished ones.
    """
    file = Path(config.out) / CONFIG_FILE
    known: list[Any] = []
    if os.path.lexists(file):
        previous = _parsed("claim_folder", file, "Use another folder.")
        try:
            changed = config.changed(previous) + (["the data"] if previous.get("data") != data else [])
            known = list(previous.get("versions", ()))
        except (AttributeError, TypeError) as error:
            raise StateError(
                f"claim_folder: {file} must hold settings of a run, got others ({error}). Use another folder."
            ) from error
        if changed:
            raise ConfigError(
                f"claim_folder: {config.out} holds runs made with other settings ({', '.join(changed)} changed). "
                "Give another --out to start again"
            )
        if versions() not in known and not accept_versions:
            raise ConfigError(
                f"claim_folder: {config.out} must be gone on with by the versions it was begun with, "
                f"{' or '.join(map(_spelled, known)) or 'unknown ones'}, got {_spelled(versions())}: numbers may "
                "differ. Install those, give another --out, or accept the change with --accept-versions"
            )
    if versions() not in known:
        known.append(versions())
    write_json(file, {**config.as_dict(), "data": data, "source": source, "versions": known})


def _parsed(function: str, file: Path, remedy: str) -> Any:
    try:
        return parse_json(read_bytes(file, most=MOST_JSON))
    except (OSError, ValueError) as error:
        raise StateError(f"{function}: {file} must {fault(error)}. {remedy}") from error


def _spelled(names: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in names.items()) if isinstance(names, dict) else str(names)


def _written(record: RunRecord, identity: Mapping[str, Any]) -> dict[str, Any]:
    return {"schema": SCHEMA, "identity": dict(identity), "versions": versions(), "record": asdict(record)}


def _read(function: str, saved: Any, identity: Mapping[str, Any], where: Path) -> RunRecord:
    """The record in what ``_written`` gave, if it is of a run with these settings."""
    schema = saved.get("schema") if isinstance(saved, Mapping) else None
    if schema != SCHEMA:
        raise StateError(f"{function}: {where} must have schema {SCHEMA}, got {schema!r}. {AGAIN}")
    names = {entry.name for entry in fields(RunRecord)}
    record, theirs = saved.get("record"), saved.get("identity")
    whole = isinstance(record, Mapping) and names - _NEWER <= set(record) <= names
    if not isinstance(theirs, Mapping) or not isinstance(record, Mapping) or not whole:
        got = sorted(record) if isinstance(record, Mapping) else record
        raise StateError(
            f"{function}: {where} must hold an identity and a record of {', '.join(sorted(names))}, got {got}. {AGAIN}"
        )
    changed = [name for name in identity if theirs.get(name) != identity[name]]
    if changed:
        raise ConfigError(
            f"{function}: {where} was made with other settings ({', '.join(changed)} changed). "
            "Give another --out to start again"
        )
    made = RunRecord(**record)
    try:
        if "reused" not in record:
            made.reused = [0] * len(made.accuracy)
        problem = made.problem()
    except TypeError as error:  # a number where a list should be
        problem = f"its record must be one of a run ({error})"
    if problem:
        raise StateError(f"{function}: {where}: {problem}. {AGAIN}")
    return made
