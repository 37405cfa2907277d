"""LoraLinear: nn.Linear with adapters."""

from __future__ import annotations

from torch import Tensor, nn

from .forward import own_linear
from .host import LoraHost

__all__ = ["LoraLinear"]


class LoraLinear(LoraHost, nn.Linear):
    r"""A linear layer with low-rank adapters on all of its rows, or on row ranges of a fused weight.

    $$ y = x W^\top + b + c\,(x A^\top)(B - B_0)^\top $$

    It takes over ``base.weight`` and ``base.bias`` (the same ``Parameter`` objects, the same state-dict keys), and
    is an ``nn.Linear``. Without an adapter it computes what ``base`` does, bit for bit.

    Args:
        base: The layer to take over.

    Shapes: x ``[..., in]`` → y ``[..., out]``.

    Raises:
        TypeError: ``base`` is not an ``nn.Linear``.

    Examples:
        >>> import torch
        >>> from keeplora.lora import LoraAdapter, LoraLinear
        >>> layer = LoraLinear(nn.Linear(8, 4))
        >>> slot = layer.add_slot("weight", "weight", None)
        >>> slot.attach(LoraAdapter(torch.eye(8)[:2], torch.zeros(4, 2), scaling=0.5))
        >>> layer(torch.ones(3, 8)).shape
        torch.Size([3, 4])
    """

    def __init__(self, base: nn.Linear):
        if not isinstance(base, nn.Linear):
            raise TypeError(f"LoraLinear: base must be an nn.Linear, got {type(base).__name__}")
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.train(base.training)
        self._init_host()

    @classmethod
    def in_place(cls, base: nn.Linear) -> LoraLinear:
        """``base`` itself, whose class changes: FSDP2 knows modules, and would not know another."""
        kind = type(base)
        base.__class__ = cls
        assert isinstance(base, LoraLinear)
        base._init_host()
        base.taken_over, base.forward_mode = kind, "factored"
        return base

    def forward(self, x: Tensor) -> Tensor:
        """``[…, in]`` to ``[…, out]``, by the formula above."""
        if self.observer is not None:
            self.observer(self, dict.fromkeys(self.slots, x))
        return own_linear(self, x, "weight", self.bias)

    def plain(self) -> nn.Linear:
        """An ``nn.Linear`` around the same parameters, without adapters; the layer itself, if it was ``in_place``."""
        if self.taken_over is not None:
            kind = self.taken_over
            for name in LoraHost.__annotations__:
                delattr(self, name)
            self.__class__ = kind  # type: ignore[assignment]
            return self
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)
