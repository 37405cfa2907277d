"""A low-rank update of one weight, and where what is not needed in a step is kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Update", "to_host"]


@dataclass(frozen=True)
class Update:
    """``ΔW = scaling · b a`` of one weight: a ``[r, in]``, b ``[out, r]``."""

    a: Tensor
    b: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def of_rank(self, rank: int) -> Update:
        """The same update with zero directions added."""
        more = rank - self.rank
        a = torch.cat([self.a, self.a.new_zeros(more, self.a.shape[1])])
        b = torch.cat([self.b, self.b.new_zeros(self.b.shape[0], more)], dim=1)
        return Update(a, b * self.scaling)

    @staticmethod
    def dense(change: Tensor) -> Update:
        """``change [out, in]`` as an update of rank ``min(out, in)``."""
        out, width = change.shape
        if out <= width:
            return Update(change, torch.eye(out, dtype=change.dtype))
        return Update(torch.eye(width, dtype=change.dtype), change)

    @staticmethod
    def stacked(updates: Sequence[Update], out: int, width: int) -> tuple[Tensor, Tensor]:
        """All A's ``[Σr, in]`` and, their scalings in them, all B's ``[out, Σr]``."""
        a = torch.cat([u.a for u in updates]) if updates else torch.zeros(0, width)
        b = torch.cat([u.b * u.scaling for u in updates], dim=1) if updates else torch.zeros(out, 0)
        return a, b

    @staticmethod
    def total(updates: Sequence[Update], out: int, width: int) -> Update:
        """The sum of updates of one weight, of rank Σr, or ``min(out, in)`` where that is less; exact either way."""
        if len(updates) == 1:
            return updates[0]
        a, b = Update.stacked(updates, out, width)
        if a.shape[0] <= min(out, width):
            return Update(a, b)
        return Update.dense((b.double() @ a.double()).to(a.dtype))


def to_host(tensor: Tensor, *, pinned: bool = False) -> Tensor:
    """A copy in main memory.

    Args:
        pinned: Whether a copy from a GPU is pinned, so that it is quick to bring back; the system may have no more room
            of that kind.
    """
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if pinned and tensor.is_cuda:
        with suppress(RuntimeError):
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return copy.copy_(tensor.detach())
