"""A run folder as it stands, finished or not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keeplora._untrusted import MOST_JSON, fault, parse_json, read_bytes
from keeplora.methods.settings import ConfigError
from keeplora.methods.state import StateError, has_state
from keeplora.report.summary import measured
from keeplora.train.config import RunConfig, override, restored
from keeplora.train.record import CONFIG_FILE, RESULT_FILE, RunRecord, load_result, run_folder

__all__ = ["Run", "read_run"]


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder holds.

    ``config`` has the seeds that have ended with some method. ``records`` are finished runs; ``failed`` those that
    ended before their time; ``begun`` and ``waiting`` the (label, seed) that are to come; ``strangers`` labels that
    have runs here and are not in config.json. ``environment`` is what summary.json says of the machine, None
    where there is none yet, and ``reference`` what fronts.json says of the tests.
    """

    folder: Path
    config: RunConfig
    records: list[RunRecord]
    failed: list[RunRecord] = field(default_factory=list)
    begun: list[tuple[str, int]] = field(default_factory=list)
    waiting: list[tuple[str, int]] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
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

    Raises:
        ConfigError: it is none, or its settings are not those of a run.
        StateError: a result in it is damaged.
    """
    place = Path(folder)
    values = _config_values(place)
    versions = values.pop("versions", [])
    values.pop("data", None)
    config = _config(place, values)
    records: list[RunRecord] = []
    failed: list[RunRecord] = []
    begun: list[tuple[str, int]] = []
    waiting: list[tuple[str, int]] = []
    for label, seed in config.pairs():
        where = run_folder(place, label, seed)
        record = load_result(where, config.identity(label, seed))
        if record is not None:
            (failed if record.failed else records).append(record)
        else:
            (begun if has_state(where / "state") else waiting).append((label, seed))
    for record in records:
        if record.tasks != records[0].tasks:
            raise StateError(
                f"report: {place} must hold runs on the same tasks, got {record.tasks} in {record.label}, seed "
                f"{record.seed}, and {records[0].tasks} elsewhere. Delete what is from another run"
            )
    ended = {record.seed for record in (*records, *failed)}
    seeds = tuple(seed for seed in config.seeds if seed in ended) or config.seeds
    present = sorted(entry.name for entry in (place / "runs").glob("*") if any(entry.glob(f"seed-*/{RESULT_FILE}")))
    return Run(
        folder=place,
        config=override(config, seeds=seeds),
        records=records,
        failed=failed,
        begun=begun,
        waiting=waiting,
        strangers=[label for label in present if label not in config.labels()],
        versions=versions if isinstance(versions, list) else [],
        environment=_part(place / "summary.json", "environment", dict),
        reference=_part(place / "fronts.json", "reference", str) or "",
    )


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
        raise ConfigError(f"report: {file} must {fault(error)}. Run the command that made the folder again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"report: {file} must hold the settings of a run, got a {type(values).__name__}")
    return values


def _config(place: Path, values: Mapping[str, Any]) -> RunConfig:
    try:
        return restored(values)
    except (AttributeError, TypeError, ValueError) as error:  # ConfigError is a ValueError
        raise ConfigError(
            f"report: {place / CONFIG_FILE} must hold the settings of a run of this version of keeplora, got others "
            f"({error})"
        ) from error


def _part(file: Path, name: str, kind: type) -> Any:
    """One entry of a file that the report of the run left; None where the run has not come that far."""
    if not os.path.lexists(file):
        return None
    try:
        values = parse_json(read_bytes(file, most=MOST_JSON))
    except (OSError, ValueError) as error:
        raise StateError(f"report: {file} must {fault(error)}. Delete it; the run writes it again") from error
    entry = values.get(name) if isinstance(values, dict) else None
    if not isinstance(entry, kind):
        raise StateError(f"report: {file} must have {name!r}, got {entry!r}. Delete it; the run writes it again")
    return entry
