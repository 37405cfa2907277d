"""The place of one adapter: rows of a weight of its layer, what the adapter does there, and what was merged before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from keeplora.math.batch import portions
from keeplora.ops.merge_weights import merge_weights

from .adapter import LoraAdapter
from .targets import Target

if TYPE_CHECKING:
    from .host import LoraHost

__all__ = ["LoraSlot", "Rows", "TokenMask", "merge_adapters"]

Rows = tuple[int, int] | None
"""A row range, or None for all."""

WIDE = (torch.float32, torch.float64)
"""Dtypes that are summed in as they are; a weight in another keeps its exact value beside it."""


class LoraSlot(nn.Module):
    """Rows of one of a layer's own frozen weights, and the adapter they carry. A module of that layer.

    Attributes:
        target: The weight as it was chosen: name, depth, tower.
        host: The layer.
        slot: The name of this place in it.
        parameter: Which of its weights.
        rows: Which rows of that, or None for all.
        adapter: Attached or None.
        learned: A and ``c (B − B₀)`` of every adapter that was merged here, on the CPU; None where some are unknown.
        master: The weight before it was rounded to the layer's dtype, since the first merge into one in half precision.
    """

    host: LoraHost
    adapter: LoraAdapter | None

    def __init__(self, target: Target, host: LoraHost, slot: str, parameter: str, rows: Rows):
        super().__init__()
        self.__dict__["host"] = host  # not as a child: it is the parent
        self.target, self.slot, self.parameter, self.rows = target, slot, parameter, rows
        self.adapter = None
        self.learned: list[tuple[Tensor, Tensor]] | None = []
        self.master: Tensor | None = None
        self.train(host.training)

    @property
    def name(self) -> str:
        """The target's name."""
        return self.target.name

    @property
    def whole(self) -> Tensor:
        """The layer's weight that the slot is rows of."""
        weight: Tensor = getattr(self.host, self.parameter)
        return weight

    @property
    def weight(self) -> Tensor:
        """The frozen weight ``[out, in]``, a view in the layer's dtype."""
        return self.whole if self.rows is None else self.whole[self.rows[0] : self.rows[1]]

    @property
    def exact_dtype(self) -> torch.dtype:
        """What the weight before rounding, and what is learned of it, are held in: float64 or float32."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def exact_weight(self) -> Tensor:
        """The weight before rounding to the layer's dtype: float32, kept since the first merge."""
        weight = self.weight
        if self.master is not None and torch.equal(self.master.to(weight.dtype), weight):
            return self.master
        # none yet, or somebody has set the weight since: what is in the layer counts
        return weight if weight.dtype in WIDE else weight.float()

    @torch.no_grad()
    def set_exact_weight(self, exact: Tensor) -> None:
        """Put a weight into the layer, rounded once; what it was before rounding is remembered."""
        weight = self.weight
        weight.copy_(exact)
        narrow = weight.dtype not in WIDE
        self.master = exact.detach().to(weight.device, torch.float32).clone() if narrow else None

    def attach(self, adapter: LoraAdapter) -> None:
        """Put an adapter here. One that is there already is a ``RuntimeError``, wrong shapes are a ``ValueError``."""
        weight = self.weight
        if self.adapter is not None:
            raise RuntimeError(f"attach: slot {self.slot!r} already holds an adapter. Merge or detach it first.")
        if (adapter.B.shape[0], adapter.A.shape[1]) != tuple(weight.shape):
            raise ValueError(
                f"attach: adapter must be for a weight of shape {list(weight.shape)}, got A "
                f"{list(adapter.A.shape)} and B {list(adapter.B.shape)} [{self.name}]"
            )
        self.adapter = adapter.to(weight.device).train(self.host.training)

    def detach(self) -> None:
        """Take the adapter away, without merging it."""
        self.adapter = None

    def merge(self) -> None:
        """[`merge_adapters`][] of this slot alone."""
        merge_adapters([self])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.master is not None:  # it follows the layer's device, never its dtype: it is why that may be half
            self.master = self.master.to(self.weight.device)
        return result

    def extra_repr(self) -> str:
        """Weight and rows, for ``print(model)``."""
        return self.parameter if self.rows is None else f"{self.parameter}[{self.rows[0]}:{self.rows[1]}]"


TokenMask = Callable[[LoraSlot, Tensor], Tensor | None]
"""``mask(slot, x) -> bool [x.shape[:-1]]``, True where a token counts; None where all do."""


@torch.no_grad()
def merge_adapters(slots: Sequence[LoraSlot]) -> None:
    """``W ← W + c (B − B₀) A`` of every slot with an adapter, exact to float32 rounding, rounded once to its dtype.

    An adapter of another kind is merged as its ``plain()`` writes it. A layer in half precision keeps the float32
    result too, so that roundings do not pile up over tasks. One call of the op for as many weights as their merged
    copies may take memory at a time (``keeplora.math.batch.portions``).
    """
    held = [(slot, slot.adapter) for slot in slots if slot.adapter is not None]
    for group in portions([slot.weight for slot, _ in held]):
        members = [(held[i][0], held[i][1].plain()) for i in group]
        merged = merge_weights(
            [slot.exact_weight for slot, _ in members],
            [adapter.A.detach() for _, adapter in members],
            [adapter.update().detach() for _, adapter in members],
            scale=[adapter.scaling for _, adapter in members],
        )
        for (slot, adapter), exact in zip(members, merged, strict=True):
            slot.set_exact_weight(exact)
            if slot.learned is not None:
                b = adapter.update().detach() * adapter.scaling
                slot.learned.append((adapter.A.detach().to("cpu", copy=True), b.cpu()))
            slot.detach()
