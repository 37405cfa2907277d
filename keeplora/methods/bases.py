r"""Orthonormal bases that lie in main memory, in parts that never change, and come to the device one at a time.

What a weight of fewer than 32 bits a number protects is kept in float16, and *is* what these numbers span:

$$ \tilde Q = \mathrm{span}(\mathrm{fl}_{16}(Q)), \qquad \sin\angle(\tilde Q, Q) \lesssim 3 \cdot 10^{-4} $$

with half of the bytes. The energy that is lost is 1e-8 of what Q holds. The weight itself is known to 4e-3 (bfloat16).
Orthonormal columns in float32 are made of it whenever they are asked for. All later directions, adapters and
certificates are made with these, so that a leak is as small as with any other basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import overload

import torch
from torch import Tensor

from keeplora.lora.update import to_host
from keeplora.math.orthonormal import orthonormal_again

__all__ = ["Bases", "NamedBases", "joined", "keeper_of", "narrowed"]

NARROW = torch.float16
"""11 bits: eight times closer than bfloat16 for numbers between 6e-5 and 1."""


def narrowed(columns: Tensor) -> Tensor:
    """Orthonormal float32 columns as they are kept of a weight of fewer than 32 bits a number."""
    return columns.to(NARROW)


def joined(parts: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
    """All columns side by side ``[in, k]``, on ``device``: orthonormal, in float32 or float64.

    Examples:
        >>> joined([narrowed(torch.tensor([[0.6], [0.8]])), torch.tensor([[0.8], [-0.6]])]).dtype
        torch.float32
    """
    there = [_exact(part.to(device or part.device, non_blocking=part.is_pinned())) for part in parts]
    return there[0] if len(there) == 1 else torch.cat(there, dim=1)


def _exact(part: Tensor) -> Tensor:
    return orthonormal_again(part) if part.dtype == NARROW else part


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
        return joined(self.parts[index], self.devices[index])

    def __len__(self) -> int:
        return len(self.parts)

    def joined(self, more: Sequence[Tensor]) -> Bases:
        """These with more columns for each."""
        return Bases([[*mine, new] for mine, new in zip(self.parts, more, strict=True)], self.devices)


class NamedBases(Mapping[str, Tensor]):
    """The basis ``[in, k]`` of every layer by its name, joined of its parts whenever it is asked for: not to be kept.

    Examples:
        >>> NamedBases({"fc": (torch.eye(3)[:, :1], torch.eye(3)[:, 1:])})["fc"].shape
        torch.Size([3, 3])
    """

    def __init__(self, parts: Mapping[str, Sequence[Tensor]]):
        self.parts = parts

    def __getitem__(self, name: str) -> Tensor:
        return joined(self.parts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def keeper_of(place: str) -> Callable[[Tensor], Tensor]:
    """What makes of columns on the device those that are kept there (``"device"``) or in main memory (``"host"``)."""
    return partial(to_host, pinned=True) if place == "host" else _contiguous


def _contiguous(columns: Tensor) -> Tensor:
    """A copy, which does not keep the matrix that the columns were a part of."""
    return columns.detach().clone(memory_format=torch.contiguous_format)
