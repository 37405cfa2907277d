"""A run folder as it stands, finished or not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keeplora._untrusted import MOST_JSON, fault, parse_json, read_bytes
from keeplora.methods.settings import ConfigError
from keeplora.methods.state import StateError, has_state
from keeplora.report.capacity import record_capacity
from keeplora.report.summary import measured, run_values, worst_certificate
from keeplora.train.config import RunConfig, override, restored
from keeplora.train.config_checks import BOTH
from keeplora.train.record import AGAIN, CONFIG_FILE, RESULT_FILE, RunRecord, load_result, run_folder

__all__ = ["Run", "read_run"]

_MOVE = "Move it elsewhere; the command that made the folder writes it again."


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder holds.

    ``config`` has the seeds that have ended with some method. ``records`` are finished runs; ``failed`` those that
    ended before their time; ``begun`` and ``waiting`` the (label, seed) that are to come; ``strangers`` labels that
    have runs here and are not in config.json; ``damaged`` results and files that cannot be read, with the reason, of
    which ``lost`` are results. ``environment`` is what summary.json says of the machine, None
    where there is none yet, and ``reference`` what fronts.json says of the tests.
    """

    folder: Path
    config: RunConfig
    records: list[RunRecord]
    failed: list[RunRecord] = field(default_factory=list)
    begun: list[tuple[str, int]] = field(default_factory=list)
    waiting: list[tuple[str, int]] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    lost: int = 0
    versions: list[Any] = field(default_factory=list)
    environment: Mapping[str, Any] | None = None
    reference: str = ""

    @property
    def unfinished(self) -> bool:
        """Whether some runs are to come."""
        return bool(self.begun or self.waiting)

    def summary(self) -> dict[str, Any] | None:
        """The summary of the finished runs, without the machine; None where there are none."""
        return measured(self.config, self.records) if self.records else None


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read a folder of ``keeplora run``, ``demo`` or ``compare``. Nothing in it is changed; plugins are not imported.

    Results that cannot be read are told in ``Run.damaged``; the others are there.

    Raises:
        ConfigError: it is none.
        StateError: its settings cannot be read, or are not those of a run.
    """
    place = Path(folder)
    values = _config_values(place)
    versions = values.pop("versions", [])
    for name in ("data", "source"):
        values.pop(name, None)
    config = _config(place, values)
    records: list[RunRecord] = []
    failed: list[RunRecord] = []
    begun: list[tuple[str, int]] = []
    waiting: list[tuple[str, int]] = []
    damaged: list[str] = []
    for label, seed in config.pairs():
        where = run_folder(place, label, seed)
        try:
            record = load_result(where, config.identity(label, seed))
            if record is not None:
                _check_figures(config, record)
                (failed if record.failed else records).append(record)
            else:
                (begun if has_state(where / "state") else waiting).append((label, seed))
        except (ConfigError, StateError) as error:
            damaged.append(f"{label}, seed {seed}: {error}")
    records, strange = _on_one_benchmark(records)
    damaged += strange
    lost = len(damaged)
    ended = {record.seed for record in (*records, *failed)}
    seeds = tuple(seed for seed in config.seeds if seed in ended) or config.seeds
    present = sorted(entry.name for entry in (place / "runs").glob("*") if any(entry.glob(f"seed-*/{RESULT_FILE}")))
    parts: dict[str, Any] = {}
    for file, name, kind in (("summary.json", "environment", dict), ("fronts.json", "reference", str)):
        try:
            parts[name] = _part(place / file, name, kind)
        except StateError as error:
            damaged.append(str(error))
    return Run(
        folder=place,
        config=override(config, seeds=seeds),
        records=records,
        failed=failed,
        begun=begun,
        waiting=waiting,
        strangers=[label for label in present if label not in config.labels()],
        damaged=damaged,
        lost=lost,
        versions=versions if isinstance(versions, list) else [],
        environment=parts.get("environment"),
        reference=parts.get("reference") or "",
    )


def _check_figures(config: RunConfig, record: RunRecord) -> None:
    """Raise `StateError` where the page could not show a record that is one of a run."""
    try:
        if not record.failed:
            run_values(record)
            worst_certificate([record])
            record_capacity(record)
        if config.evaluate_on == BOTH and not record.failed and not record.correct:
            raise ValueError("it has no test items, which runs on both splits have")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise StateError(
            f"report: its figures must be those of a run, got {type(error).__name__}: {error}. {AGAIN}"
        ) from error


def _on_one_benchmark(records: list[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """The records on the tasks that most of them have, and what is to be said of the others."""
    kinds = Counter((*record.tasks, *record.items) for record in records)
    usual = max(kinds, key=kinds.__getitem__, default=())
    same = [record for record in records if (*record.tasks, *record.items) == usual]
    return same, [
        f"{record.label}, seed {record.seed}: report: runs must be on the same tasks and test items, got "
        f"{record.tasks} {record.items or ''} where others have {same[0].tasks} {same[0].items or ''}".rstrip()
        for record in records
        if (*record.tasks, *record.items) != usual
    ]


def _config_values(place: Path) -> dict[str, Any]:
    file = place / CONFIG_FILE
    if not os.path.lexists(file):
        got = "a folder without it" if place.is_dir() else "something else" if place.exists() else "no such folder"
        raise ConfigError(
            f"report: RUN must be a folder that keeplora run, demo or compare has written, with {CONFIG_FILE} and "
            f"runs/METHOD/seed-N/{RESULT_FILE} in it, got {str(place)!r}: {got}. Give what was given as --out there"
        )
    try:
        values = parse_json(read_bytes(file, most=MOST_JSON))
    except (OSError, ValueError) as error:
        raise StateError(f"report: {file} must {fault(error)}. {_MOVE}") from error
    if not isinstance(values, dict):
        raise StateError(f"report: {file} must hold the settings of a run, got a {type(values).__name__}. {_MOVE}")
    return values


def _config(place: Path, values: Mapping[str, Any]) -> RunConfig:
    try:
        return restored(values)
    except (AttributeError, TypeError, ValueError) as error:  # ConfigError is a ValueError
        raise StateError(
            f"report: {place / CONFIG_FILE} must hold the settings of a run of this version of keeplora, got others "
            f"({error}). {_MOVE}"
        ) from error


def _part(file: Path, name: str, kind: type) -> Any:
    """One entry of a file that the report of the run left; None where the run has not come that far."""
    if not os.path.lexists(file):
        return None
    try:
        values = parse_json(read_bytes(file, most=MOST_JSON))
    except (OSError, ValueError) as error:
        raise StateError(f"report: {file} must {fault(error)}. {_MOVE}") from error
    entry = values.get(name) if isinstance(values, dict) else None
    if not isinstance(entry, kind):
        raise StateError(f"report: {file} must have {name!r}, got {entry!r}. {_MOVE}")
    return entry
