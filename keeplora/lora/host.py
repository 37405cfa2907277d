"""What every layer that holds adapters has in common: slots, exact weights, and the forward."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keeplora.math.precision import full_precision
from keeplora.ops.merge_weights import merge_weights

from .adapter import LoraAdapter
from .forward import (
    Ahead,
    ForwardMode,
    Part,
    compute_dtype,
    factored_linear,
    merge_is_cheaper,
    merged_linear,
    merged_weights,
)

__all__ = ["LoraHost", "Observer", "Rows", "Tap"]

Observer = Callable[["LoraHost", Mapping[str, Tensor]], None]
"""Called in every forward with the input of each slot of the layer; slots that share an input get one tensor."""

Rows = tuple[int, int] | None
"""A row range, or None for all."""

Tap = Callable[["LoraHost", Tensor, Tensor, Mapping[str, Rows]], Tensor]
"""``tap(host, x, y, columns)`` stands in for an output y of the layer; ``columns`` tells each slot's share of y."""


class LoraHost(nn.Module):
    """A layer whose weights carry adapters in named slots.

    A slot is a row range of one of the layer's own frozen weights. ``LoraLinear`` has the slots its targets
    name (usually one), ``LoraAttention`` q, k and v.
    """

    adapters: nn.ModuleDict
    slots: dict[str, tuple[str, Rows]]
    observer: Observer | None
    tap: Tap | None
    forward_mode: ForwardMode
    to_merge: dict[str, torch.dtype]
    """Weights that the running forward had to merge by itself, and the dtype it multiplied in."""
    merged_ahead: dict[str, Ahead]
    learned: dict[str, list[tuple[Tensor, Tensor]] | None]
    """A and ``c (B − B₀)`` of every adapter that was merged into a slot, on the CPU; None where some are unknown."""

    def _init_host(self) -> None:
        self.adapters = nn.ModuleDict()
        self.slots = {}
        self.observer = None
        self.tap = None
        self.forward_mode = "auto"
        self.to_merge = {}
        self.merged_ahead = {}
        self.learned = {}
        self._masters: dict[str, Tensor] = {}

    @abstractmethod
    def plain(self) -> nn.Module:
        """The layer as it was before it was taken over, around the same parameters."""

    def add_slot(self, slot: str, parameter: str, rows: Rows) -> None:
        weight = getattr(self, parameter, None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"add_slot: parameter must be a weight of {type(self).__name__}, got {parameter!r}")
        if rows is not None and not 0 <= rows[0] < rows[1] <= weight.shape[0]:
            raise ValueError(
                f"add_slot: rows must lie in [0, {weight.shape[0]}] with start < stop, got {rows} [{slot}]"
            )
        if slot in self.slots:
            raise ValueError(f"add_slot: slot must be new, got {slot!r} a second time")
        for other, (name, taken) in self.slots.items():
            if name == parameter and (rows is None or taken is None or (rows[0] < taken[1] and taken[0] < rows[1])):
                raise ValueError(f"add_slot: rows must not overlap another slot, got {rows} [{slot} and {other}]")
        self.slots[slot] = (parameter, rows)

    def slot_weight(self, slot: str) -> Tensor:
        """The frozen weight rows of a slot ``[out, in]``: a view, in the layer's dtype."""
        parameter, rows = self.slots[slot]
        weight: Tensor = getattr(self, parameter)
        return weight if rows is None else weight[rows[0] : rows[1]]

    def exact_weight(self, slot: str) -> Tensor:
        """The slot's weight before rounding to the layer's dtype: float32, kept since the first merge."""
        weight, master = self.slot_weight(slot), self._masters.get(slot)
        if master is not None and torch.equal(master.to(weight.dtype), weight):
            return master
        # none yet, or somebody has set the weight since: what is in the layer counts
        return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()

    @torch.no_grad()
    def attach(self, slot: str, adapter: LoraAdapter) -> None:
        weight = self.slot_weight(slot)
        if slot in self.adapters:
            raise RuntimeError(f"attach: slot {slot!r} already holds an adapter. Merge or detach it first.")
        if (adapter.B.shape[0], adapter.A.shape[1]) != tuple(weight.shape):
            raise ValueError(
                f"attach: adapter must be for a weight of shape {list(weight.shape)}, got A "
                f"{list(adapter.A.shape)} and B {list(adapter.B.shape)} [{slot}]"
            )
        self.adapters[slot] = adapter.to(weight.device)

    def detach_adapter(self, slot: str) -> None:
        if slot in self.adapters:
            del self.adapters[slot]

    @torch.no_grad()
    def merge(self, slot: str) -> None:
        """``W ← W + c (B − B₀) A``, exact to float32 rounding, then rounded once to the layer's dtype.

        A layer in half precision keeps the float32 result too, so that roundings do not pile up over tasks.
        """
        adapter = self.adapters[slot]
        assert isinstance(adapter, LoraAdapter)
        with full_precision(adapter.A.device):
            [merged] = merge_weights(
                [self.exact_weight(slot)],
                [adapter.A.detach()],
                [adapter.update().detach()],
                scale=[adapter.scaling],
            )
        self.set_exact_weight(slot, merged)
        learned = self.learned.setdefault(slot, [])
        if learned is not None:
            b = adapter.update().detach() * adapter.scaling
            learned.append((adapter.A.detach().to("cpu", copy=True), b.cpu()))
        self.detach_adapter(slot)

    @torch.no_grad()
    def set_exact_weight(self, slot: str, exact: Tensor) -> None:
        weight = self.slot_weight(slot)
        weight.copy_(exact)
        self._masters.pop(slot, None)
        if weight.dtype not in (torch.float32, torch.float64):
            self._masters[slot] = exact.detach().to(weight.device, torch.float32).clone()

    def _observe(self, inputs: Mapping[str, Tensor]) -> None:
        if self.observer is not None:
            self.observer(self, inputs)

    def _own_linear(self, x: Tensor, parameter: str, bias: Tensor | None) -> Tensor:
        """``x Wᵀ + b`` for one of the layer's weights, with the adapters of all its slots."""
        slots = {slot: rows for slot, (name, rows) in self.slots.items() if name == parameter}
        return self._linear(x, getattr(self, parameter), bias, slots, parameter)

    def merge_job(self, parameter: str) -> tuple[Tensor, list[Part]]:
        """One of the layer's weights and the adapters that would be merged into it."""
        slots = {slot: rows for slot, (name, rows) in self.slots.items() if name == parameter}
        return getattr(self, parameter), self._parts(slots)

    def _linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, slots: Mapping[str, Rows], parameter: str = ""
    ) -> Tensor:
        """``x Wᵀ + b`` with the adapters of ``slots``, which are rows of this weight."""
        parts = self._parts(slots)
        if not parts:
            y = F.linear(x, weight, bias)
        elif self._merges(x, weight, bias, parts):
            y = merged_linear(x, self._merged_weight(weight, parts, parameter), bias, parts)
        else:
            y = factored_linear(x, weight, bias, parts)
        return y if self.tap is None else self.tap(self, x, y, slots)

    def _parts(self, slots: Mapping[str, Rows]) -> list[Part]:
        found = []
        for slot, rows in slots.items():
            if slot in self.adapters:
                adapter = self.adapters[slot]
                assert isinstance(adapter, LoraAdapter)
                found.append(Part(adapter, rows))
        return found

    def _merges(self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part]) -> bool:
        """Whether to multiply with the merged weight.

        Not where W, b or A are trained, whose gradients need x, nor inside torch.func's transforms, which have to see
        every step.
        """
        if self.forward_mode == "factored" or weight.requires_grad or (bias is not None and bias.requires_grad):
            return False
        if torch._C._are_functorch_transforms_active():
            return False
        if any(part.adapter.A.requires_grad or part.adapter.dropout for part in parts):
            return False
        return self.forward_mode == "merged" or merge_is_cheaper(x.numel() // x.shape[-1], weight)

    def _merged_weight(self, weight: Tensor, parts: Sequence[Part], parameter: str) -> Tensor:
        ahead = self.merged_ahead.pop(parameter, None)
        if ahead is not None and ahead.is_current(weight, parts):
            return ahead.merged
        dtype = compute_dtype(weight)
        if parameter and torch.is_grad_enabled():
            self.to_merge[parameter] = dtype
        return merged_weights([(weight, parts)], dtype)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # The exact weights follow the layer's device, never its dtype: they are the reason it may be half.
        self._masters = {slot: exact.to(self.slot_weight(slot).device) for slot, exact in self._masters.items()}
        return result
