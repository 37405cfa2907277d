"""Orthonormal bases that lie in main memory, in parts that never change, and come to the device one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import overload

import torch
from torch import Tensor

from keeplora.lora.update import to_host

__all__ = ["Bases", "keeper_of"]


class Bases(Sequence[Tensor]):
    """The basis ``[in, k]`` of every slot, joined of its parts on the slot's device whenever it is asked for.

    Args:
        parts: Of every slot the columns in their order, ``[in, k_t]`` each, wherever they lie.
        devices: Of every slot.

    Examples:
        >>> Bases([[torch.eye(3)[:, :1], torch.eye(3)[:, 1:]]], [torch.device("cpu")])[0].shape
        torch.Size([3, 3])
    """

    def __init__(self, parts: Sequence[Sequence[Tensor]], devices: Sequence[torch.device]):
        self.parts, self.devices = list(parts), list(devices)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        there = [part.to(self.devices[index], non_blocking=part.is_pinned()) for part in self.parts[index]]
        return there[0] if len(there) == 1 else torch.cat(there, dim=1)

    def __len__(self) -> int:
        return len(self.parts)

    def joined(self, more: Sequence[Tensor]) -> Bases:
        """These with more columns for each."""
        return Bases([[*mine, new] for mine, new in zip(self.parts, more, strict=True)], self.devices)


def keeper_of(place: str) -> Callable[[Tensor], Tensor]:
    """What makes of columns on the device those that are kept there (``"device"``) or in main memory (``"host"``)."""
    return partial(to_host, pinned=True) if place == "host" else _contiguous


def _contiguous(columns: Tensor) -> Tensor:
    """A copy, which does not keep the matrix that the columns were a part of."""
    return columns.detach().clone(memory_format=torch.contiguous_format)
