"""Stage-wise search: which settings to run next, and which are best so far. Pure functions on rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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


def ranked(rows: Iterable[Row], seeds: Sequence[int]) -> list[tuple[Settings, dict[str, float]]]:
    """Settings that ran on all ``seeds``, best first by :func:`score` of their means."""
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
    return sorted(scored, key=lambda item: score(item[1]), reverse=True)


def score(means: Mapping[str, float]) -> float:
    """The rule: the mean of Transfer, Avg and Last.

    Last alone would choose settings that learn fast and forget what no task trains; a continual learner is to keep
    its zero-shot ability (Transfer), to be good all along (Avg) and at the end (Last). One rule for every method.

    >>> score({"transfer": 40.0, "avg": 50.0, "last": 66.0, "learn": 90.0})
    52.0
    """
    return (means["transfer"] + means["avg"] + means["last"]) / 3
