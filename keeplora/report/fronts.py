"""Every method over its learning rates: fronts, a choice on validation data, and its test on the same items.

The rule of choice, one for all methods: of a method's rates the one with the best Last on the validation splits of all
tasks, less five points for every point of Transfer lost beyond the allowance under zero-shot; means over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from keeplora.report.metrics import continual_metrics
from keeplora.report.paired import Difference, Figure, Values, compare, figure, item_values
from keeplora.report.summary import group, run_values
from keeplora.train.config import ZERO_SHOT, RunConfig
from keeplora.train.record import RunRecord

ALLOWANCES = (0.0, 3.0)
"""Points of Transfer under zero-shot that learning may cost: two, to see whether that decides the ranking."""
PENALTY = 5.0
"""Points of Last that every further point of Transfer is worth."""
LEVEL = 0.05
_COSTS = ("trainable_parameters", "seconds_per_step", "switch_seconds", "peak_bytes", "inference_overhead")


def score(transfer: float | None, last: float, zero_shot: float | None, allowance: float) -> float:
    """What a setting is chosen by: Last, less five points for every point of Transfer lost beyond the allowance.

    Last alone would choose settings that learn fast and spoil what no task has trained yet. A continual learner is
    to keep its zero-shot ability, up to an allowance; the penalty makes that a soft bound, the same for every method.

    >>> score(46.0, 70.0, zero_shot=49.0, allowance=3.0), score(45.0, 72.0, zero_shot=49.0, allowance=3.0)
    (70.0, 67.0)
    """
    if transfer is None or zero_shot is None:  # of a single task: Last alone counts
        return last
    return last - PENALTY * max(0.0, zero_shot - allowance - transfer)


@dataclass(frozen=True, eq=False)
class Point:
    """One setting of a method: its runs with all seeds, in percent.

    ``validation`` has Transfer and Last there, means over seeds; ``figures`` the test split's, with errors; ``values``
    what they are made of, for every seed. A single task has no Transfer in any of them.
    """

    label: str
    rate: float
    validation: Mapping[str, float]
    figures: Mapping[str, Figure]
    values: Mapping[str, Sequence[Values]]
    costs: Mapping[str, float | None]
    earlier_data: tuple[str, ...]

    def less(self, other: Point, metric: str) -> Difference:
        """This setting's figure less that of another, tested on the items of both."""
        return compare(self.values[metric], other.values[metric])


def point(label: str, rate: float, records: Sequence[RunRecord]) -> Point:
    """The point of these runs, which differ in their seeds alone."""
    seeds = [item_values(record) for record in records]
    values = {metric: [seed[metric] for seed in seeds] for metric in seeds[0]}
    choice = [_on_validation(record) for record in records]
    costs = [run_values(record) for record in records]
    return Point(
        label,
        rate,
        {name: float(np.mean([one[name] for one in choice])) for name in choice[0]},
        {metric: figure(runs) for metric, runs in values.items()},
        values,
        {name: _mean([one[name] for one in costs]) for name in _COSTS},
        tuple(sorted({name for record in records for name in record.earlier_data})),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return float(np.mean(given)) if len(given) == len(values) else None


def _on_validation(record: RunRecord) -> dict[str, float]:
    """Transfer and Last; entries that neither needs were not evaluated, and stand for nothing."""
    matrix = np.array(record.validation, dtype=np.float64)  # None is NaN here
    metrics = continual_metrics(100 * np.where(np.tri(len(matrix), dtype=bool) & np.isnan(matrix), 0.0, matrix))
    return {**({} if metrics.transfer is None else {"transfer": metrics.transfer}), "last": metrics.last}


def on_front(places: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (Transfer, Last) no other beats: none is at least as good in both and better in one.

    >>> on_front([(50.0, 60.0), (48.0, 70.0), (47.0, 69.0)])
    [True, True, False]
    """
    return [not any(other[0] >= x and other[1] >= y and tuple(other) != (x, y) for other in places) for x, y in places]


@dataclass(frozen=True)
class Fronts:
    """All points of all methods, and the model before it learned anything."""

    zero_shot: Point
    points: Mapping[str, Sequence[Point]]
    reference: str

    def chosen(self, method: str, allowance: float) -> Point:
        """The method's setting under this allowance; of equals the lowest rate."""
        bound = self.zero_shot.validation.get("transfer")
        return max(
            self.points[method],
            key=lambda p: score(p.validation.get("transfer"), p.validation["last"], bound, allowance),
        )

    def keeps(self, chosen: Point, allowance: float) -> bool:
        """Whether a setting's Transfer on validation is within the allowance; without Transfer it is."""
        before = self.zero_shot.validation.get("transfer")
        return before is None or chosen.validation["transfer"] >= before - allowance

    def ranking(self, allowance: float) -> list[str]:
        """Methods by Last on the test split, best first."""
        return sorted(self.points, key=lambda name: -self.chosen(name, allowance).figures["last"].mean)

    def reversals(self, one: float, other: float) -> dict[tuple[str, str], bool]:
        """Pairs of methods that change places between two allowances; whether both orders are significant."""
        pairs = {}
        for a, b in combinations(self.ranking(one), 2):  # a is before b
            first = self.chosen(a, one).less(self.chosen(b, one), "last")
            second = self.chosen(a, other).less(self.chosen(b, other), "last")
            if first.mean * second.mean < 0:
                pairs[a, b] = max(first.p, second.p) < LEVEL
        return pairs

    def edges(self, allowance: float) -> dict[str, list[str]]:
        """Methods whose choice is the lowest or the highest of several rates: a better one may lie beyond."""
        found: dict[str, list[str]] = {"lowest": [], "highest": []}
        for method, points in self.points.items():
            place = list(points).index(self.chosen(method, allowance))
            if len(points) > 1 and place in (0, len(points) - 1):
                found["lowest" if place == 0 else "highest"].append(method)
        return found


def gather(
    config: RunConfig, labels: Mapping[str, Sequence[str]], records: Sequence[RunRecord], reference: str
) -> Fronts:
    """The points of finished runs; ``labels`` are those of every method's settings, lowest rate first."""
    runs = {label: found for label, found in group(config, records).items() if found}
    zero = next(label for label in runs if config.of(label).method == ZERO_SHOT)
    made = {label: point(label, config.of(label).learning_rate, runs[label]) for label in runs}
    points = {method: [made[label] for label in settings] for method, settings in labels.items()}
    return Fronts(made[zero], points, reference)


def as_dict(config: RunConfig, fronts: Fronts) -> dict[str, Any]:
    """The content of fronts.json: percent, seconds and bytes."""
    return {
        "benchmark": config.benchmark,
        "split": config.split,
        "seeds": list(config.seeds),
        "reference": fronts.reference,
        "zero_shot": _point_dict(fronts.zero_shot),
        "methods": {
            method: [
                {**_point_dict(one), "on_front": on}
                for one, on in zip(points, on_front([place(one) for one in points]), strict=True)
            ]
            for method, points in fronts.points.items()
        },
        "chosen": {f"{allowance:g}": _choices(fronts, allowance) for allowance in ALLOWANCES},
        "reversals": [
            {"methods": list(pair), "significant": significant}
            for pair, significant in fronts.reversals(*ALLOWANCES).items()
        ],
    }


def place(one: Point) -> tuple[float, float]:
    """Transfer and Last; twice Last of a single task, which has no Transfer."""
    last = one.figures["last"].mean
    return one.figures["transfer"].mean if "transfer" in one.figures else last, last


def _point_dict(one: Point) -> dict[str, Any]:
    test = {metric: {"mean": value.mean, "error": value.error} for metric, value in one.figures.items()}
    return {"label": one.label, "learning_rate": one.rate, "validation": dict(one.validation), "test": test,
            **one.costs, "earlier_data": list(one.earlier_data)}  # fmt: skip


def _choices(fronts: Fronts, allowance: float) -> dict[str, Any]:
    reference = fronts.chosen(fronts.reference, allowance)
    result = {}
    for method in fronts.points:
        chosen = fronts.chosen(method, allowance)
        tests = {metric: chosen.less(reference, metric)._asdict() for metric in chosen.figures}
        within = fronts.keeps(chosen, allowance)
        result[method] = {"label": chosen.label, "within_allowance": within, "less_reference": tests}
    return result
