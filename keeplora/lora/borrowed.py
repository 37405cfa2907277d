"""BorrowedLinear: somebody else's linear layer, called as it is, whose inputs and output gradients can be looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .host import LoraHost
from .slot import LoraSlot, Rows
from .targets import Target

__all__ = ["BorrowedLinear"]


class BorrowedLinear(LoraHost):
    """Stands in for a linear layer during a pass over data, so that a layer of another library can be a target.

    Its forward calls ``base``, whatever ``base`` does inside (quantised products, hooks), and adds nothing. Adapters
    can be attached to be merged; they take no part in the forward.

    Args:
        base: The layer; the ``weight [out, in]`` it multiplies with may be quantised.
        dequantize: Gives the weight in floating point where ``base.weight`` is quantised. Such a weight cannot be
            merged into.
    """

    def __init__(
        self, base: nn.Linear, dequantize: Callable[[], Tensor] | None = None, *, target: Target | None = None
    ):
        super().__init__()
        self.base = base
        self.dequantize = dequantize
        self.train(base.training)
        self._init_host()
        self.add_slot("weight", "weight", None, target)

    @property
    def weight(self) -> Tensor:
        """The layer's weight; of a quantised one only shape and device, in float32 zeros that take no memory."""
        if self.dequantize is None:
            return self.base.weight
        size = (self.base.out_features, self.base.in_features)
        return torch.zeros((), device=self.base.weight.device).expand(size)

    def _new_slot(self, target: Target, slot: str, parameter: str, rows: Rows) -> LoraSlot:
        kind = LoraSlot if self.dequantize is None else _QuantisedSlot
        return kind(target, self, slot, parameter, rows)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The borrowed layer's output, and the adapter's added to it."""
        if self.observer is not None:
            self.observer(self, {"weight": x})
        y: Tensor = self.base(x, *args, **kwargs)
        return y if self.tap is None else self.tap(self, x, y, {"weight": None})

    def plain(self) -> nn.Linear:
        return self.base


class _QuantisedSlot(LoraSlot):
    """The slot of a weight that can be read in floating point, and not be written."""

    @property
    def exact_weight(self) -> Tensor:
        host = self.host
        assert isinstance(host, BorrowedLinear)
        assert host.dequantize is not None
        return host.dequantize().detach().float()

    def set_exact_weight(self, exact: Tensor) -> None:
        self.begin_merge()

    def begin_merge(self) -> None:
        raise RuntimeError(
            f"BorrowedLinear: weight must not be quantised to be merged into, got one that is [{self.name}]"
        )
