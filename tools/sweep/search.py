"""Stage-wise search: which settings to run next, and which are best so far. Pure functions on rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keeplora.report import fronts
from keeplora.train.config import MethodConfig, fingerprint

Settings = dict[str, Any]
Row = Mapping[str, Any]


def as_method(method: str, settings: Settings) -> MethodConfig:
    """Flat settings, ``learning_rate`` among them, as a configuration's method."""
    rest = {name: value for name, value in settings.items() if name != "learning_rate"}
    return MethodConfig(method=method, learning_rate=settings["learning_rate"], settings=rest)


def label_of(method: str, settings: Settings) -> str:
    """A name for these settings that stays the same from run to run."""
    return f"{method}-{fingerprint({'method': method, 'settings': settings})[:8]}"


def candidates(best: Settings, stage: Mapping[str, Any]) -> list[Settings]:
    """What a stage tries around ``best``, the best itself left out (it has been run)."""
    tried = [{**best, **patch} for patch in stage.get("try", [])]
    for name, factors in stage.get("scale", {}).items():
        tried += [{**best, name: float(f"{best[name] * factor:.2g}")} for factor in factors]
    distinct: list[Settings] = []
    for settings in tried:
        if settings != best and settings not in distinct:
            distinct.append(settings)
    return distinct


def ranked(rows: Iterable[Row], seeds: Sequence[int], zero_shot: float) -> list[tuple[Settings, dict[str, float]]]:
    """Settings that ran on all ``seeds``, best first by :func:`score` of their means.

    ``zero_shot`` is the Transfer of the model that never learned anything.
    """
    groups: dict[str, dict[int, Row]] = {}
    for row in rows:
        groups.setdefault(row["label"], {})[row["seed"]] = row
    scored = []
    for runs in groups.values():
        if not all(seed in runs for seed in seeds):
            continue
        chosen = [runs[seed] for seed in seeds]
        means = {
            name: math.fsum(row[name] for row in chosen) / len(chosen)
            for name in ("last", "avg", "transfer", "learn", "forgetting")
        }
        scored.append((dict(chosen[0]["settings"]), means))
    return sorted(scored, key=lambda item: score(item[1], zero_shot), reverse=True)


ALLOWANCE = 3.0
"""Points of Transfer that learning may cost."""


def score(means: Mapping[str, float], zero_shot: float) -> float:
    """The rule of :func:`keeplora.report.fronts.score`: Last, less five points per point of Transfer beyond three.

    >>> score({"last": 70.0, "transfer": 46.0}, zero_shot=49.0), score({"last": 72.0, "transfer": 45.0}, zero_shot=49.0)
    (70.0, 67.0)
    """
    return fronts.score(means["transfer"], means["last"], zero_shot, ALLOWANCE)


TABLE = "| Transfer | Avg | Last | Learn |\n|---|---|---|---|---|"


def cells(change: Settings, row: Row, unchanged: str) -> str:
    """A change and what it did, as a line of a table under :data:`TABLE`.

    >>> cells({"r": 4}, {"transfer": 45.41, "avg": 57.67, "last": 64.43, "learn": 66.71}, "base")
    '| r 4 | 45.4 | 57.7 | 64.4 | 66.7 |'
    """
    what = ", ".join(f"{name} {value}" for name, value in change.items()) or unchanged
    return " | ".join([f"| {what}", *(f"{row[name]:.1f}" for name in ("transfer", "avg", "last", "learn"))]) + " |"
