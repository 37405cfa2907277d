"""Continual-learning metrics of the instruction benchmarks, where a task is scored from when it was learned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["InstructionMetrics", "instruction_metrics"]


@dataclass(frozen=True)
class InstructionMetrics:
    """Metrics of one run, in the unit of the matrix (fractions or percent)."""

    mft: float
    """Mean fine-tune accuracy: each task right after it was learned."""
    mfn: float
    """Mean final accuracy: all tasks after the last one."""
    maa: float
    """Mean average accuracy: over the tasks so far, after each task."""
    bwt: float | None
    """Backward transfer: final accuracy less the one right after learning. Below 0 where a run forgets; None for a
    single task."""

    def as_dict(self) -> dict[str, float | None]:
        """The metrics by name."""
        return asdict(self)


def instruction_metrics(accuracy: ArrayLike | Sequence[Sequence[float]]) -> InstructionMetrics:
    """Summarise the lower triangle of ``accuracy``: ``a[t, j]`` is the accuracy on task j after learning task t ≥ j.

        MFT = mean over j of a[j, j]
        MFN = mean over j of a[T-1, j]
        MAA = mean over t of (mean over j <= t of a[t, j])
        BWT = mean over j < T-1 of (a[T-1, j] - a[j, j])

    BWT is None for a single task, where it is a mean over nothing. Computed in float64.

    Args:
        accuracy: Rows of 1, 2, …, T numbers, or ``[T, T]``, whose upper triangle is not read and may be NaN.

    Raises:
        ValueError: there is no row, a row has another length, or a value of the lower triangle is not finite.

    Sources: Guo et al., "HiDe-LLaVA", ACL 2025 (UCIT); MCITlib; CL-VISTA, arXiv 2604.00677.

    Examples:
        >>> instruction_metrics([[90.0], [70.0, 80.0]]).as_dict()
        {'mft': 85.0, 'mfn': 75.0, 'maa': 82.5, 'bwt': -20.0}
    """
    acc = _lower_triangle(accuracy)
    learned, final = np.diag(acc), acc[-1]
    return InstructionMetrics(
        mft=float(learned.mean()),
        mfn=float(final.mean()),
        maa=float(np.mean([acc[t, : t + 1].mean() for t in range(len(acc))])),
        bwt=float((final - learned)[:-1].mean()) if len(acc) > 1 else None,
    )


def _lower_triangle(accuracy: ArrayLike | Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """``[T, T]`` with NaN above the diagonal."""
    rows = [np.asarray(row, dtype=np.float64) for row in accuracy]  # type: ignore[union-attr]
    tasks = len(rows)
    if not rows:
        raise ValueError("instruction_metrics: accuracy must have a row for every task that was learned, got none")
    acc = np.full((tasks, tasks), np.nan)
    for t, row in enumerate(rows):
        if row.ndim != 1 or len(row) not in (t + 1, tasks):
            raise ValueError(
                f"instruction_metrics: accuracy must have {t + 1} numbers in row {t}, or {tasks} in all rows, "
                f"got shape {row.shape}. Give the accuracy on tasks 0 to {t} after task {t}"
            )
        acc[t, : t + 1] = row[: t + 1]
        if not np.isfinite(acc[t, : t + 1]).all():
            j = int(np.argmin(np.isfinite(acc[t, : t + 1])))
            raise ValueError(
                f"instruction_metrics: accuracy must be finite, got {acc[t, j]} at [{t}, {j}]. "
                "Evaluate every task learned so far after each task"
            )
    return acc
