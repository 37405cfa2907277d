"""Continual-learning metrics from the accuracy matrix, as MTIL defines them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Metrics:
    """Metrics of one run, in the unit of the matrix (fractions or percent); None where a mean is over nothing."""

    transfer: float | None
    avg: float
    last: float
    forgetting: float | None
    learn: float

    def as_dict(self) -> dict[str, float | None]:
        """The metrics by name."""
        return asdict(self)


def continual_metrics(accuracy: ArrayLike) -> Metrics:
    """Summarise ``accuracy [T, T]``, where ``acc[i, j]`` is the accuracy on task j after learning task i.

        Transfer   = mean over j >= 1 of (mean over i < j of acc[i, j])     zero-shot ability that is left
        Avg        = mean over all i, j of acc[i, j]
        Last       = mean over j of acc[T-1, j]
        Forgetting = mean over j < T-1 of (max over i of acc[i, j] - acc[T-1, j])
        Learn      = mean over j of acc[j, j]                               right after learning

    Transfer and Forgetting are None for a single task, where they are means over nothing. Computed in float64.
    Raises ``ValueError`` when the matrix is empty, not square, or has a value that is not finite.
    Source: Zheng et al., "Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language
    Models", ICCV 2023.

    >>> continual_metrics([[80.0, 40.0], [60.0, 90.0]]).as_dict()
    {'transfer': 40.0, 'avg': 67.5, 'last': 75.0, 'forgetting': 20.0, 'learn': 85.0}
    """
    acc = _square("continual_metrics", accuracy)
    tasks = acc.shape[0]
    columns = _columns(acc)
    lost = [acc[:, j].max() - acc[-1, j] for j in range(tasks - 1)]
    return Metrics(
        transfer=float(np.mean(columns["transfer"])) if tasks > 1 else None,
        avg=float(acc.mean()),
        last=float(acc[-1].mean()),
        forgetting=float(np.mean(lost)) if lost else None,
        learn=float(np.diag(acc).mean()),
    )


def task_metrics(accuracy: ArrayLike) -> dict[str, list[float]]:
    """What the papers print for every task, whose means are the headline figures of ``continual_metrics``.

    Returns:
        ``transfer`` of tasks 1 to T - 1, since nothing comes before task 0; ``avg`` and ``last`` of all.

    Raises:
        ValueError: as ``continual_metrics``.

    Examples:
        >>> task_metrics([[80.0, 40.0], [60.0, 90.0]])
        {'transfer': [40.0], 'avg': [70.0, 65.0], 'last': [60.0, 90.0]}
    """
    return _columns(_square("task_metrics", accuracy))


def _columns(acc: NDArray[np.float64]) -> dict[str, list[float]]:
    return {
        "transfer": [float(acc[:j, j].mean()) for j in range(1, acc.shape[0])],
        "avg": [float(value) for value in acc.mean(axis=0)],
        "last": [float(value) for value in acc[-1]],
    }


def _square(function: str, accuracy: ArrayLike) -> NDArray[np.float64]:
    acc = np.asarray(accuracy, dtype=np.float64)
    if acc.ndim != 2 or acc.shape[0] != acc.shape[1] or acc.size == 0:
        raise ValueError(
            f"{function}: accuracy must be a square matrix [tasks, tasks], got shape {acc.shape}. "
            "Give one row for every task that was learned"
        )
    if not np.isfinite(acc).all():
        i, j = np.argwhere(~np.isfinite(acc))[0]
        raise ValueError(f"{function}: accuracy must be finite, got {acc[i, j]} at [{i}, {j}]")
    return acc


def mean_std(values: ArrayLike) -> dict[str, float | None]:
    """``{"mean", "std"}`` over seeds; std is the sample deviation (n - 1), None for one seed.

    >>> mean_std([1.0, 3.0])
    {'mean': 2.0, 'std': 1.4142135623730951}
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise ValueError(f"mean_std: values must be a non-empty list of numbers, got shape {data.shape}")
    return {"mean": float(data.mean()), "std": float(data.std(ddof=1)) if data.size > 1 else None}
