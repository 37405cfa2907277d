"""The place of one adapter: rows of a weight of its layer, what the adapter does there, and what was merged before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from keeplora._messages import listed
from keeplora.math.batch import portions
from keeplora.ops.merge_weights import merge_weights

from .adapter import LoraAdapter
from .exact import WIDE, Exact, exact_dtype
from .kept import Kept
from .shares import LocalRows, rows_of
from .targets import Target
from .update import Update, to_host

if TYPE_CHECKING:
    from .host import LoraHost

__all__ = ["LoraSlot", "Rows", "TokenMask", "merge_adapters"]

log = logging.getLogger("keeplora")

Rows = tuple[int, int] | None
"""A row range, or None for all."""


class LoraSlot(nn.Module):
    """Rows of one of a layer's own frozen weights, and the adapter they carry. A module of that layer.

    Attributes:
        target: The weight as it was chosen: name, depth, tower.
        host: The layer.
        slot: The name of this place in it.
        parameter: Which of its weights.
        rows: Which rows of that, or None for all.
        adapter: Attached or None.
        exact: What the weight is before it is rounded to the layer's dtype.
    """

    host: LoraHost
    adapter: LoraAdapter | None

    def __init__(self, target: Target, host: LoraHost, slot: str, parameter: str, rows: Rows):
        super().__init__()
        self.__dict__["host"] = host  # not as a child: it is the parent
        self.target, self.slot, self.parameter, self.rows = target, slot, parameter, rows
        self.adapter = None
        self.exact = Exact()
        self.train(host.training)

    @property
    def name(self) -> str:
        """The target's name."""
        return self.target.name

    @property
    def stored(self) -> Tensor:
        """The layer's parameter that the slot is rows of."""
        weight: Tensor = getattr(self.host, self.parameter)
        return weight

    @property
    def whole(self) -> Tensor:
        """The layer's weight that the slot is rows of; of a quantised one shape and device alone."""
        return self.stored

    def readable(self, *, comparable: bool = False) -> Tensor:
        """That weight in numbers to be read; ``comparable``: to be hashed."""
        return self.whole.detach()

    @property
    def keeps(self) -> bool:
        """Whether what is learned is kept beside the weight, and not merged into it."""
        return isinstance(self.exact, Kept)

    def keep_beside(self) -> None:
        """From now on leave the weight as it is. Before anything was merged."""
        self.exact = Kept(self)

    @property
    def weight(self) -> Tensor:
        """The frozen weight ``[out, in]``, a view in the layer's dtype."""
        return self.part(self.whole)

    def part(self, tensor: Tensor) -> Tensor:
        """The slot's ``[out, in]`` of a tensor of the shape of [`whole`][]: a view."""
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]

    @property
    def local(self) -> LocalRows:
        """The rows of the weight that are in this process: all of them, unless FSDP2 has shared them out."""
        return rows_of(self.weight)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A matrix where the weight is, by default in its dtype."""
        return torch.zeros(shape, dtype=dtype or self.weight.dtype, device=self.weight.device)

    @property
    def exact_dtype(self) -> torch.dtype:
        """What the weight before rounding, and what is learned of it, are held in: float64 or float32."""
        return exact_dtype(self.weight)

    @property
    def coarse(self) -> bool:
        """Whether the weight is stored in fewer than 32 bits a number."""
        return self.weight.dtype not in WIDE

    @property
    def exact_weight(self) -> Tensor:
        """The weight before rounding to the layer's dtype, float32 where that is half precision: its rows here."""
        return self.exact.value(self.local.rows)

    @torch.no_grad()
    def set_exact_weight(self, exact: Tensor) -> None:
        """Put a weight into the layer, rounded once; what it was before rounding is remembered."""
        self.exact.set(self.local.rows, exact)

    @property
    def learned(self) -> list[Update] | None:
        """What was merged here, in main memory; None where some of it is unknown."""
        total, learned = self.exact.total, self.exact.learned
        return learned if learned is None or total is None else [Update.dense(total), *learned]

    @torch.no_grad()
    def forget(self) -> None:
        """No longer know the updates that the weight is made of: for methods that write what no update tells."""
        self.exact.forget(self.local.rows)

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

    def begin_merge(self) -> None:
        """What must be remembered before an update is added to the weight."""
        self.exact.begin(self.local.rows)

    def merge(self) -> None:
        """[`merge_adapters`][] of this slot alone."""
        merge_adapters([self])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.exact.follow(self.weight)
        return result

    def extra_repr(self) -> str:
        """Weight and rows, for ``print(model)``."""
        return self.parameter if self.rows is None else f"{self.parameter}[{self.rows[0]}:{self.rows[1]}]"


TokenMask = Callable[[LoraSlot, Tensor], Tensor | None]
"""``mask(slot, x) -> bool [x.shape[:-1]]``, True where a token counts; None where all do."""


@torch.no_grad()
def merge_adapters(slots: Sequence[LoraSlot]) -> None:
    """``W ← W + c (B − B₀) A`` of every slot with an adapter, exact to float32 rounding, rounded once to its dtype.

    Where updates are kept beside the weight (``keeplora.lora.kept``) this one joins them, and the weight stays.

    An adapter of another kind is merged as its ``plain()`` writes it. Roundings do not pile up over tasks
    (``keeplora.lora.exact``). One call of the op for as many weights as their merged copies may take memory at a
    time (``keeplora.math.batch.portions``).
    """
    turned = []
    held = [(slot, slot.adapter) for slot in slots if slot.adapter is not None and not slot.keeps]
    for group in portions([slot.weight for slot, _ in held]):
        members = [(held[i][0], held[i][1].plain()) for i in group]
        for slot, _ in members:
            slot.begin_merge()
        places = [slot.local for slot, _ in members]
        merged = merge_weights(
            [slot.exact_weight for slot, _ in members],
            [adapter.A.detach() for _, adapter in members],
            [local.of(adapter.update().detach()) for local, (_, adapter) in zip(places, members, strict=True)],
            scale=[adapter.scaling for _, adapter in members],
        )
        for local, (slot, adapter), exact in zip(places, members, merged, strict=True):
            if slot.exact.merged(local.rows, exact, _update_of(adapter)):
                turned.append(slot.name)
            slot.detach()
    for slot in slots:
        if slot.adapter is not None and isinstance(slot.exact, Kept):
            if slot.exact.keep(_update_of(slot.adapter.plain())):
                turned.append(slot.name)
            slot.detach()
    if turned:
        log.info(
            "%d layers keep the sum of their updates from now on, which is smaller than all of them: %s",
            len(turned), listed(turned),
        )  # fmt: skip


def _update_of(adapter: LoraAdapter) -> Update:
    return Update(to_host(adapter.A), to_host(adapter.update()), adapter.scaling)
