"""open_clip's own attention block (``block_type="custom"``), with adapters on its fused q, k, v weight."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from keeplora.lora import LoraHost, LoraLinear, Target, attend, own_linear

if TYPE_CHECKING:
    from open_clip.transformer import Attention

__all__ = ["attention_host", "attention_targets", "take_over"]


def attention_targets(path: str, module: nn.Module, depth: int, tower: str) -> list[Target]:
    """q, k and v as row ranges of ``in_proj_weight``, and ``out_proj``."""
    weight = module.in_proj_weight
    assert isinstance(weight, Tensor)
    width = weight.shape[1]
    targets = [
        Target(f"{path}.{letter}_proj", path, "in_proj_weight", (i * width, (i + 1) * width), depth, tower)
        for i, letter in enumerate("qkv")
    ]
    return [*targets, Target(f"{path}.out_proj", f"{path}.out_proj", "weight", None, depth, tower)]


@cache
def attention_host() -> type[LoraHost]:
    """The class that takes such a block over; made on demand, because open_clip is an optional library."""
    from open_clip.transformer import Attention

    class LoraOpenClipAttention(LoraHost, Attention):  # type: ignore[misc]
        """``open_clip.transformer.Attention`` around the same parameters, with adapters.

        ``softmax(q kᵀ)`` with whatever the block has of normalised queries and keys, cosine logits, head scales and
        inner normalisation.
        """

        in_proj_weight: Tensor
        in_proj_bias: Tensor | None
        logit_scale: Tensor | None
        logit_scale_max: float
        head_scale: Tensor | None
        ln_q: nn.Module
        ln_k: nn.Module
        ln_inner: nn.Module
        out_proj: nn.Module
        attn_drop: nn.Dropout
        out_drop: nn.Dropout

        def __init__(self, base: Attention):
            nn.Module.__init__(self)
            take_over(self, base)
            self._init_host()

        def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            if self.observer is not None:
                self.observer(self, dict.fromkeys(self.slots, x))
            packed = own_linear(self, x, "in_proj_weight", self.in_proj_bias)
            heads_of = (*x.shape[:2], self.num_heads, self.head_dim)
            q, k, v = (t.reshape(heads_of).transpose(1, 2) for t in packed.chunk(3, dim=-1))
            mask = _additive(attn_mask, q) if attn_mask is not None else None
            if self.logit_scale is not None:
                weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
                weights = weights * self.logit_scale.clamp(max=self.logit_scale_max).exp()
                weights = (weights if mask is None else weights + mask).softmax(-1)
                heads = self.attn_drop(weights) @ v
            else:
                heads = attend(self.ln_q(q), self.ln_k(k), v, mask, self.attn_drop.p if self.training else 0.0)
            if self.head_scale is not None:
                heads = heads * self.head_scale
            y = self.out_proj(self.ln_inner(heads.transpose(1, 2).flatten(-2)))
            dropped: Tensor = self.out_drop(y)
            return dropped

        def plain(self) -> Attention:
            """An ``open_clip.transformer.Attention`` around the same parameters, without adapters."""
            layer = Attention.__new__(Attention)
            nn.Module.__init__(layer)
            take_over(layer, self)
            for name in self.__dict__.keys() - Attention(2, 1).__dict__.keys():
                layer.__dict__.pop(name, None)
            layer._modules.pop("slots", None)
            if isinstance(layer.out_proj, LoraLinear):
                layer.out_proj = layer.out_proj.plain()
            return layer

    return LoraOpenClipAttention


def take_over(new: nn.Module, old: nn.Module) -> None:
    """The parameters, buffers, children and settings of ``old``: the same objects."""
    for name, value in old.__dict__.items():
        new.__dict__[name] = value.copy() if name in ("_parameters", "_buffers", "_modules") else value


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    """``[L, L]``, ``[N, heads, L, L]`` or ``[N heads, L, L]``, boolean (True: not allowed) or added."""
    if mask.dim() == 3:
        mask = mask.view(q.shape[0], q.shape[1], *mask.shape[1:])
    if mask.dtype.is_floating_point:
        return mask.to(q.dtype)
    return q.new_zeros(mask.shape).masked_fill_(mask, float("-inf"))
