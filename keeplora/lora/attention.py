"""LoraAttention: nn.MultiheadAttention with adapters on any subset of q, k, v; out_proj is a LoraLinear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forward import adapted_linear, own_linear
from .host import LoraHost
from .linear import LoraLinear
from .slot import LoraSlot, Rows
from .targets import Target, attention_targets

__all__ = ["LoraAttention", "attend"]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    r"""``softmax(q kᵀ / √d + mask) v`` for ``[batch, heads, tokens, d]``; ``mask`` is added (float), or None.

    torch's fused kernel, except on a CPU in half precision: there its backward was measured 2 to 9 times slower
    than the written-out formula (ViT-B/16 and 17-token sequences, one thread, torch 2.15).
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = (weights if mask is None else weights + mask).softmax(-1)
        return F.dropout(weights, dropout) @ v if dropout else weights @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class LoraAttention(LoraHost, nn.MultiheadAttention):
    r"""Multi-head attention whose q, k, v weights carry adapters, in one fused projection where it is fused.

    $$
    \mathrm{out}\Bigl(\mathrm{softmax}\bigl(Q K^\top / \sqrt d\bigr) V\Bigr), \quad
    Q = x (W_q + c_q B_q A_q)^\top + b_q, \ldots
    $$

    It takes over the parameters of ``base`` (the same objects, the same state-dict keys), and is an
    ``nn.MultiheadAttention``: ``batch_first`` or not, masks, key/value of other width, attention weights on
    request. ``out_proj`` becomes a [`LoraLinear`][], so its adapter is applied once.

    Raises:
        TypeError: ``base`` is not an ``nn.MultiheadAttention``.
        ValueError: ``base`` adds bias_k/bias_v or a zero attention row.

    Examples:
        >>> from keeplora.lora import LoraAttention
        >>> x = torch.randn(2, 5, 16)
        >>> layer = LoraAttention(nn.MultiheadAttention(16, 4, batch_first=True))
        >>> layer(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, base: nn.MultiheadAttention):
        if not isinstance(base, nn.MultiheadAttention):
            raise TypeError(f"LoraAttention: base must be an nn.MultiheadAttention, got {type(base).__name__}")
        if base.bias_k is not None or base.bias_v is not None or base.add_zero_attn:
            raise ValueError(
                "LoraAttention: base must have add_bias_kv=False and add_zero_attn=False, got "
                f"add_bias_kv={base.bias_k is not None}, add_zero_attn={base.add_zero_attn}"
            )
        nn.Module.__init__(self)
        for name in (
            "embed_dim",
            "kdim",
            "vdim",
            "num_heads",
            "head_dim",
            "dropout",
            "batch_first",
            "_qkv_same_embed_dim",
            "add_zero_attn",
        ):
            setattr(self, name, getattr(base, name))
        for name in (
            "in_proj_weight",
            "q_proj_weight",
            "k_proj_weight",
            "v_proj_weight",
            "in_proj_bias",
            "bias_k",
            "bias_v",
        ):
            self.register_parameter(name, getattr(base, name))
        out = base.out_proj
        self.out_proj = out if isinstance(out, LoraLinear) else LoraLinear(out)  # type: ignore[assignment]
        self.train(base.training)
        self._init_host()

    def add_slot(self, slot: str, parameter: str, rows: Rows, target: Target | None = None) -> LoraSlot:
        """As [`LoraHost.add_slot`][], for ``q_proj``, ``k_proj`` and ``v_proj`` with the weights they stand for."""
        known = {t.name[2:]: (t.parameter, t.rows) for t in attention_targets("x", self, 0, "")[:3]}
        if known.get(slot) != (parameter, rows):
            raise ValueError(
                f"LoraAttention: slots must be among {known}, got {slot!r}: {(parameter, rows)}. "
                "Use keeplora.lora.attention_targets."
            )
        return super().add_slot(slot, parameter, rows, target)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``, unbatched ``[tokens, width]`` input included."""
        if self.observer is not None:
            self.observer(self, {slot: {"q": query, "k": key, "v": value}[slot[0]] for slot in self.slots})
        batched, one = query.dim() == 3, query is key and key is value
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._project(query, None if one else key, None if one else value)
        q, k, v = (t.view(*t.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, is_causal, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = (weights if mask is None else weights + mask).softmax(-1)
            heads = (F.dropout(weights, dropout) if dropout else weights) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = attend(q, k, v, mask, dropout)
        y = self.out_proj(heads.transpose(1, 2).flatten(-2))
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> list[Tensor]:
        """Queries, keys, values with their adapters; ``key`` and ``value`` None mean self-attention."""
        if self.in_proj_weight is not None and key is None:
            return list(own_linear(self, query, "in_proj_weight", self.in_proj_bias).chunk(3, dim=-1))
        bias = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        key, value = (query if t is None else t for t in (key, value))
        outputs, places = [], self.places()
        for i, (slot, x) in enumerate(zip(("q_proj", "k_proj", "v_proj"), (query, key, value), strict=True)):
            if self.in_proj_weight is not None:
                weight = self.in_proj_weight[i * self.embed_dim : (i + 1) * self.embed_dim]
            else:
                weight = getattr(self, f"{slot}_weight")
            here = [(places[slot], None)] if slot in places else []
            outputs.append(adapted_linear(self, x, weight, bias[i], here))
        return outputs

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, is_causal: bool, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """One additive mask, broadcastable to [batch, heads, queries, keys], from the three kinds of mask."""
        if is_causal and attn_mask is None:
            raise ValueError("LoraAttention: attn_mask must be given when is_causal is True, got None")
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            if mask.dim() == 3:
                mask = mask.view(q.shape[0], self.num_heads, *mask.shape[1:])
        if padding is not None:
            keys = _additive(padding, q.dtype)
            keys = keys.reshape(-1, 1, 1, k.shape[-2])
            mask = keys if mask is None else mask + keys
        return mask

    def plain(self) -> nn.MultiheadAttention:
        """An ``nn.MultiheadAttention`` around the same parameters, without adapters."""
        layer = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, dropout=self.dropout, bias=self.in_proj_bias is not None,
            kdim=self.kdim, vdim=self.vdim, batch_first=self.batch_first, device="meta",
        )  # fmt: skip
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            setattr(layer, name, getattr(self, name))
        assert isinstance(self.out_proj, LoraLinear)
        layer.out_proj.weight, layer.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return layer.train(self.training)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = not allowed) as 0 / −inf; a float mask in ``dtype``."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)
