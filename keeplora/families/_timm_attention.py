"""timm's EvaAttention, which reads the weight of its fused qkv without calling the layer, with adapters on it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from keeplora.lora import LoraHost, LoraLinear, own_linear

from ._open_clip_attention import take_over

if TYPE_CHECKING:
    from timm.models.eva import EvaAttention

__all__ = ["eva_host"]


class _BiasedQkv(LoraLinear):
    """The fused q, k, v projection with the biases that its attention keeps: ``x Wᵀ + [b_q, b_k, b_v]``."""

    def __init__(self, base: nn.Linear, attention: nn.Module):
        super().__init__(base)
        self.__dict__["attention"] = attention  # not as a child: it is the parent

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(self, dict.fromkeys(self.slots, x))
        attention: nn.Module = self.__dict__["attention"]
        own: dict[str, Any] = {**attention._parameters, **attention._buffers}
        return own_linear(self, x, "weight", torch.cat([own[f"{letter}_bias"] for letter in "qkv"]))


@cache
def eva_host() -> type[LoraHost]:
    """The class that takes such a block over; made on demand, because timm is an optional library."""
    from timm.models.eva import EvaAttention

    class LoraEvaAttention(LoraHost, EvaAttention):
        """``timm.models.eva.EvaAttention`` around the same parameters, whose ``qkv`` is called.

        The forward is timm's own. Where the biases are not separate, it sees none and calls ``qkv``, which adds them.
        """

        def __init__(self, base: EvaAttention):
            nn.Module.__init__(self)
            take_over(self, base)
            self._init_host()
            inside = base.q_bias is not None and not base.qkv_bias_separate
            self.qkv = _BiasedQkv(base.qkv, self) if inside else LoraLinear(base.qkv)

        @property
        def q_bias(self) -> Tensor | None:  # type: ignore[override]
            return self._parameters.get("q_bias") if type(self.qkv) is LoraLinear else None

        def plain(self) -> EvaAttention:
            """An ``EvaAttention`` around the same parameters, without adapters."""
            layer = EvaAttention.__new__(EvaAttention)
            nn.Module.__init__(layer)
            take_over(layer, self)
            for name in self.__dict__.keys() - EvaAttention(2, 1, scale_norm=False).__dict__.keys():
                layer.__dict__.pop(name, None)
            layer._modules.pop("slots", None)
            for name, child in list(layer._modules.items()):
                if isinstance(child, LoraLinear):
                    layer._modules[name] = child.plain()
            return layer

    return LoraEvaAttention
