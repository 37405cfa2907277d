"""Errors that count both the seeds and the test items, and the paired test between two methods on the same items.

Transfer, Avg and Last are means over tasks of means over a task's items of what a run gives each item: the share of
the evaluations in question in which the item was right. With ``v[s, j, k]`` for seed s, task j, item k, and V_s the
figure of one seed:

    figure = mean over s of V_s                V_s = mean over j of (mean over k of v[s, j, k])
    error² = var over s of V_s / seeds  +  1/tasks² · Σ_j var over k of (mean over s of v[s, j, k]) / items_j

The first term is what other seeds would change, the second what other test items of the same tasks would. What a seed
does to single items is in both, so the sum is a little too large rather than too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keeplora.train.record import RunRecord

Values = list[NDArray[np.float64]]
"""For every task that counts, what each of its items gets."""


class Figure(NamedTuple):
    """A figure over seeds and items, in the unit of the values; ``dof`` are the degrees of freedom of its error."""

    mean: float
    error: float
    dof: float


class Difference(NamedTuple):
    """A figure of one method less that of another; ``p`` is two-sided."""

    mean: float
    error: float
    p: float


def item_values(record: RunRecord) -> dict[str, Values]:
    """``transfer``, ``avg`` and ``last`` of every test item, in percent; their means are those of the accuracy matrix.

    Transfer has no values for the first task, which is never unseen; a single task has no Transfer.
    """
    tasks = range(len(record.tasks))
    right = [100.0 * np.stack([record.right(i, j) for i in tasks]) for j in tasks]  # [evaluations, items_j] each
    transfer = {"transfer": [right[j][:j].mean(0) for j in tasks[1:]]} if len(tasks) > 1 else {}
    return {
        **transfer,
        "avg": [one.mean(0) for one in right],
        "last": [one[-1] for one in right],
    }


def figure(runs: Sequence[Values]) -> Figure:
    """Mean and error of one figure; ``runs[s][j]`` are the values [items_j] of task j with seed s.

    The degrees of freedom are Satterthwaite's, of the sum of the variances of the seeds and of every task.

    >>> figure([[np.array([1.0, 3.0])], [np.array([3.0, 5.0])]])
    Figure(mean=3.0, error=1.414..., dof=2.0)
    """
    seeds, tasks = len(runs), len(runs[0])
    means = np.array([np.mean([one.mean() for one in values]) for values in runs])
    pooled = [np.mean([values[j] for values in runs], axis=0) for j in range(tasks)]
    parts = [(float(one.var(ddof=1)) / len(one) / tasks**2, len(one) - 1) for one in pooled]
    if seeds > 1:
        parts.append((float(means.var(ddof=1)) / seeds, seeds - 1))
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / dof for part, dof in parts)
    return Figure(float(means.mean()), variance**0.5, variance**2 / spread if spread else np.inf)


def compare(ours: Sequence[Values], theirs: Sequence[Values]) -> Difference:
    """The paired test: the same items and, seed by seed, the same draws; t = mean / error of the differences.

    Raises:
        ValueError: the two were not run with the same seeds on the same items.
    """
    shapes = [[[len(one) for one in values] for values in runs] for runs in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"compare: ours and theirs must be of the same seeds and items, got {shapes[0]} and {shapes[1]}"
        )
    from scipy.special import stdtr  # Student's distribution

    runs = [[a - b for a, b in zip(one, other, strict=True)] for one, other in zip(ours, theirs, strict=True)]
    mean, error, dof = figure(runs)
    if error == 0:
        return Difference(mean, error, 1.0 if mean == 0 else 0.0)
    return Difference(mean, error, float(2 * stdtr(dof, -abs(mean) / error)))
