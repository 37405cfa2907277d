"""What a run leaves on disk: its state after every task, and its result at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from keeplora._files import write_json
from keeplora.methods.settings import ConfigError
from keeplora.methods.state import State, StateError, has_state, read_state, write_state
from keeplora.train.config import RunConfig

RESULT_FILE = "result.json"
CONFIG_FILE = "config.json"


@dataclass
class RunRecord:
    """What is measured in one run of one method with one seed. Accuracies are fractions.

    ``accuracy[i][j]`` is task j after task i; ``witness[i]`` the task that is never trained. ``inference_seconds`` are
    those of one evaluation at the end of the run and of the same by the untouched pretrained model; empty in results
    of 0.1's first runs, which did not measure them.
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

    @property
    def finished_tasks(self) -> int:
        """Tasks that are learned, merged and evaluated."""
        return len(self.accuracy)

    @property
    def done(self) -> bool:
        """Whether every task is finished."""
        return self.finished_tasks == len(self.tasks)


def run_folder(out: str | os.PathLike[str], label: str, seed: int) -> Path:
    """Where one run keeps its files."""
    return Path(out) / "runs" / label / f"seed-{seed}"


def save_progress(folder: Path, record: RunRecord, method_state: State, identity: Mapping[str, Any]) -> None:
    """Save a run between two tasks, atomically."""
    meta = {"identity": dict(identity), "record": asdict(record), "method": method_state.meta}
    write_state(folder / "state", State(tensors=method_state.tensors, meta=meta))


def load_progress(folder: Path, identity: Mapping[str, Any]) -> tuple[RunRecord, State] | None:
    """The state of an interrupted run, or None when there is none.

    Raises :class:`~keeplora.methods.settings.ConfigError` when it was made with other settings.
    """
    if not has_state(folder / "state"):
        return None
    saved = read_state(folder / "state")
    _same_settings(saved.meta["identity"], identity, folder / "state")
    return RunRecord(**saved.meta["record"]), State(tensors=saved.tensors, meta=saved.meta["method"])


def save_result(folder: Path, record: RunRecord, identity: Mapping[str, Any], *, keep_state: bool) -> None:
    """Save a finished run; the state it would resume from goes, unless it is wanted."""
    write_json(folder / RESULT_FILE, {"identity": dict(identity), "record": asdict(record)})
    if not keep_state:
        shutil.rmtree(folder / "state", ignore_errors=True)


def load_result(folder: Path, identity: Mapping[str, Any]) -> RunRecord | None:
    """The result of a finished run, or None. Raises ``ConfigError`` when it was made with other settings."""
    file = folder / RESULT_FILE
    if not file.is_file():
        return None
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        record = RunRecord(**saved["record"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise StateError(f"load_result: {file} must be a result of this version: {error}. Delete it") from error
    _same_settings(saved["identity"], identity, file)
    return record


def claim_folder(config: RunConfig, data: str) -> None:
    """Write ``config.json`` into the run folder; refuse a folder that holds runs with other settings.

    ``data`` is the workload's fingerprint: results on other data must not stand in one table either.

    More seeds or methods are welcome: their runs stand beside the finished ones.
    """
    file = Path(config.out) / CONFIG_FILE
    if file.is_file():
        try:
            previous = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise StateError(f"claim_folder: {file} must be JSON: {error}. Use another folder") from error
        changed = config.changed(previous) + (["the benchmark's data"] if previous.get("data") != data else [])
        if changed:
            raise ConfigError(
                f"claim_folder: {config.out} holds runs made with other settings ({', '.join(changed)} changed). "
                "Give another --out, or delete the folder to start again"
            )
    write_json(file, {**config.as_dict(), "data": data})


def _same_settings(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    changed = [name for name in wanted if saved.get(name) != wanted[name]]
    if changed:
        raise ConfigError(
            f"load_progress: {where} was made with other settings ({', '.join(changed)} changed). "
            "Give another --out, or delete the folder to start again"
        )
