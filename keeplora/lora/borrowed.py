"""BorrowedLinear: somebody else's linear layer, called as it is, whose inputs and output gradients can be looked at."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .host import LoraHost
from .quantised import QuantisedSlot, is_quantised
from .slot import LoraSlot, Rows
from .targets import Target

__all__ = ["BorrowedLinear"]


class BorrowedLinear(LoraHost):
    """Stands in for a linear layer during a pass over data, so that a layer of another library can be a target.

    Its forward calls ``base``, whatever ``base`` does inside (quantised products, hooks), and adds nothing. Adapters
    can be attached to be merged; they take no part in the forward.

    Args:
        base: The layer; the ``weight [out, in]`` it multiplies with may be quantised. Such a weight cannot be merged
            into.
    """

    def __init__(self, base: nn.Linear, *, target: Target | None = None):
        super().__init__()
        self.base = base
        self.train(base.training)
        self._init_host()
        self.add_slot("weight", "weight", None, target)

    @property
    def weight(self) -> Tensor:
        """The layer's weight."""
        return self.base.weight

    def _new_slot(self, target: Target, slot: str, parameter: str, rows: Rows) -> LoraSlot:
        if is_quantised(self.base.weight):
            return QuantisedSlot(target, self, slot, parameter, rows, self.base)
        return super()._new_slot(target, slot, parameter, rows)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The borrowed layer's output, and the adapter's added to it."""
        if self.observer is not None:
            self.observer(self, {"weight": x})
        y: Tensor = self.base(x, *args, **kwargs)
        return y if self.tap is None else self.tap(self, x, y, {"weight": None})

    def plain(self) -> nn.Linear:
        return self.base
