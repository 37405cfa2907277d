"""Bytes that data-parallel processes exchange in a task switch."""

from __future__ import annotations

from .memory import Setting
from .shapes import Shapes

__all__ = ["ring_bytes", "wire_bytes"]


def wire_bytes(shapes: Shapes, setting: Setting, *, balance: bool = True) -> dict[str, int]:
    r"""Bytes of the tensors that are summed over all processes, by phase; small Python objects come on top.

    $$
    \text{before} = 4 \sum \text{out} \cdot \text{in}, \quad
    \text{or sketched } 4 \sum (w \cdot \text{in} + \text{out} \cdot w),\; w = 8 r; \qquad
    \text{after} = 4 \sum_{\text{inputs}} \text{in}^2
    $$

    Args:
        balance: Whether ``balance`` is on, as it is by default: ``8 (r + 1)`` bytes of energies for every weight.
    """
    weights, width = shapes.adapted, 8 * setting.rank
    exact = setting.budget is None or 4 * sum(m.numel for m in weights) <= setting.budget
    before = 0
    for m in weights:
        before += 4 * m.numel if exact or m.rows <= width else 4 * (width * m.width + m.rows * width)
        before += 8 * (setting.rank + 1) if balance else 0
    return {"before_task": before, "after_task": 4 * sum(d * d for d in shapes.inputs())}


def ring_bytes(payload: int, processes: int) -> int:
    """What each process sends when a payload is summed in a ring: ``2 (N − 1) / N`` of it."""
    return 2 * (processes - 1) * payload // processes
