"""How large a task's merged update is beside the weights; said where it is next to nothing or far too much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from keeplora._messages import warn

__all__ = ["LEAST", "MOST", "update_size", "warn_of_size"]

LEAST, MOST = 5e-4, 0.5
"""Of ‖ΔW‖ / ‖W‖: on the shipped benchmarks nothing is learned below, and what the model knew is lost above."""


@torch.no_grad()
def update_size(
    updates: Sequence[Iterable[tuple[Tensor, Tensor]]],
    weights: Iterable[Tensor],
    everywhere: Callable[[float], float] = float,
) -> float:
    r"""The length of all updates together, relative to that of the weights they are added to.

    $$
    \sqrt{\frac{\sum_l \lVert B_l A_l \rVert_F^2}{\sum_l \lVert W_l \rVert_F^2}}, \qquad
    \lVert B A \rVert_F^2 = \langle B^\top B,\, A A^\top \rangle
    $$

    Args:
        updates: A ``[r, in]`` and B ``[out, r]`` of each update of each weight.
        weights: ``[out, in]`` each, or the rows of it that are in this process.
        everywhere: The sum over all processes of what is summed over rows in each.

    Returns:
        0 where nothing was learned; in float64.

    Examples:
        >>> a, b, w = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), 10 * torch.eye(2)
        >>> round(update_size([[(a, b)]], [w]), 4)
        0.3536
    """
    moved, held = 0.0, 0.0
    for parts, weight in zip(updates, weights, strict=True):
        held += float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
        for a, b in parts:
            rows, columns = a.double(), b.double()
            moved += float(((columns.T @ columns) * (rows @ rows.T)).sum())
    held = everywhere(held)
    return math.sqrt(max(moved, 0.0) / held) if held else 0.0


def warn_of_size(function: str, size: float) -> None:
    """Say that a task's update is next to nothing, or about as large as the weights; nothing of one that is 0.

    A task may be closed untrained, so that its inputs are protected.
    """
    if 0 < size < LEAST:
        warn(
            f"{function}: the task's update must be {LEAST:.0e} of the weights or more to teach them anything, got "
            f"{size:.1e} (‖ΔW‖ / ‖W‖ of the adapted layers). It is learned all the same. Raise the learning rate or "
            "alpha (docs/which-settings.md says where to start), or train for more steps."
        )
    elif size > MOST:
        warn(
            f"{function}: the task's update must be at most {MOST} of the weights to leave what they know, got "
            f"{size:.2g} (‖ΔW‖ / ‖W‖ of the adapted layers). It is learned all the same. Go back to the state before "
            "the task, and lower the learning rate or alpha."
        )
