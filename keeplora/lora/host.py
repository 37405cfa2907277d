"""What every layer that holds adapters has in common: its slots, and who looks at its inputs and outputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .adapter import LoraAdapter
from .forward import Ahead, ForwardMode
from .slot import LoraSlot, Rows
from .targets import Target

__all__ = ["LoraHost", "Observer", "Tap"]

Observer = Callable[["LoraHost", Mapping[str, Tensor]], None]
"""Called in every forward with the input of each slot of the layer; slots that share an input get one tensor."""

Tap = Callable[["LoraHost", Tensor, Tensor, Mapping[str, Rows]], Tensor]
"""``tap(host, x, y, columns)`` stands in for an output y of the layer; ``columns`` tells each slot's share of y."""


class LoraHost(nn.Module):
    """A layer whose weights carry adapters in named slots, each a row range of one of the layer's own frozen weights,
    or an expert's slice.

    ``LoraLinear`` has the slots its targets name (usually one), ``LoraAttention`` q, k and v, ``LoraExperts`` one for
    each expert. How an output is computed is told in ``keeplora.lora.forward``, from top to bottom.
    """

    slots: nn.ModuleDict
    by_parameter: dict[str, tuple[tuple[LoraSlot, Rows], ...]]
    """The slots by the name of the weight they are rows of, and which."""
    observer: Observer | None
    tap: Tap | None
    forward_mode: ForwardMode
    to_merge: dict[str, torch.dtype]
    """Weights that the running forward had to merge by itself, and the dtype it multiplied in."""
    merged_ahead: dict[str, Ahead]
    taken_over: type[nn.Linear] | None
    """The layer's own class, where it is the same object as before."""
    trains_weights: bool
    """Whether a method trains the layer's own weights now, and not adapters."""

    def _init_host(self) -> None:
        self.slots = nn.ModuleDict().train(self.training)
        self.by_parameter = {}
        self.observer = None
        self.tap = None
        self.forward_mode = "auto"
        self.to_merge = {}
        self.merged_ahead = {}
        self.taken_over = None
        self.trains_weights = False

    @abstractmethod
    def plain(self) -> nn.Module:
        """The layer as it was before it was taken over, around the same parameters."""

    def source(self, slot: LoraSlot, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input of the layer that an observed ``x [..., in]`` was taken from, and which of its rows those of x are.

        None where x is the input itself.
        """
        return x, None

    @property
    def adapters(self) -> dict[str, LoraAdapter]:
        """The attached adapters, by slot."""
        return {name: slot.adapter for name, slot in self.places().items() if slot.adapter is not None}

    def places(self) -> dict[str, LoraSlot]:
        """The slots by name."""
        return dict(self.slots.items())  # type: ignore[arg-type]

    def add_slot(self, slot: str, parameter: str, rows: Rows, target: Target | None = None) -> LoraSlot:
        """A new place for an adapter: ``rows`` of the layer's weight ``parameter``.

        Raises:
            ValueError: no such weight, rows outside of it, or rows or a name that another slot has.
        """
        out = self._rows_of(parameter)
        if out is None:
            raise ValueError(f"add_slot: parameter must be a weight of {type(self).__name__}, got {parameter!r}")
        if rows is not None and not 0 <= rows[0] < rows[1] <= out:
            raise ValueError(f"add_slot: rows must lie in [0, {out}] with start < stop, got {rows} [{slot}]")
        if slot in self.slots:
            raise ValueError(f"add_slot: slot must be new, got {slot!r} a second time")
        others = self.by_parameter.get(parameter, ())
        for other, taken in others:
            if rows is None or taken is None or (rows[0] < taken[1] and taken[0] < rows[1]):
                raise ValueError(f"add_slot: rows must not overlap another slot, got {rows} [{slot} and {other.slot}]")
        made = self._new_slot(target or Target(slot, "", parameter, rows, 0, "model"), slot, parameter, rows)
        self.slots[slot] = made
        self.by_parameter[parameter] = (*others, (made, rows))
        return made

    def _rows_of(self, parameter: str) -> int | None:
        """Of one of the layer's weights; None where it has none of that name."""
        weight = getattr(self, parameter, None)
        return weight.shape[0] if isinstance(weight, Tensor) else None

    def _new_slot(self, target: Target, slot: str, parameter: str, rows: Rows) -> LoraSlot:
        return LoraSlot(target, self, slot, parameter, rows)
