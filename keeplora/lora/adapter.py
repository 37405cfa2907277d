"""One low-rank adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LoraAdapter", "compute_dtype"]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype a product with this weight or input is formed in: autocast's where that is on, else its own."""
    kind = tensor.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


class LoraAdapter(nn.Module):
    r"""A low-rank update of one weight matrix (Hu et al. 2022, arXiv:2106.09685).

    $$ \Delta W = c\,(B - B_0)\,A, \qquad c = s\,\lambda_l $$

    Args:
        a: ``[r, in]``. Frozen unless ``train_a``.
        b: ``[out, r]``, trained. Zeros if None.
        scaling: c, the product of ``alpha / r`` (or ``alpha / sqrt(r)``) and the depth scale.
        train_a: Whether A is trained too.
        dropout: Probability of dropping an input of A during training.
        origin: $B_0$ ``[out, r]``: a start B that must not change the function. The update counts from
            it, so the frozen weight is never touched (KeepLoRA's ``W ← W − s B_0 A``, without its rounding).
    """

    origin: Tensor | None

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        scaling: float,
        *,
        train_a: bool = False,
        dropout: float = 0.0,
        origin: Tensor | None = None,
    ):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"LoraAdapter: dropout must lie in [0, 1), got {dropout}")
        self.A = nn.Parameter(_dense(a), requires_grad=train_a)
        self.B = nn.Parameter(_dense(b))
        self.scaling = float(scaling)
        self.dropout = float(dropout)
        self.register_buffer("origin", None if origin is None else _dense(origin))

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.A.shape[0]

    def update(self) -> Tensor:
        """``B − B₀ [out, r]``: what multiplies A in the weight's update."""
        return self.B if self.origin is None else self.B - self.origin

    def tensors(self) -> dict[str, Tensor]:
        """All that distinguishes it from another adapter of its kind and settings, by name: to be saved."""
        return self.state_dict()

    def plain(self) -> LoraAdapter:
        """This update as a plain adapter.

        Raises:
            RuntimeError: what it computes is no update of the weight.
        """
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``c · (x Aᵀ)(B − B₀)ᵀ``: the adapter's share of the layer's output, in the dtype the layer computes in."""
        x = x.to(compute_dtype(x))  # autocast would reuse its own copy of A after the next step
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        t = F.linear(x, self.A.to(x.dtype)) * self.scaling
        return F.linear(t, self.update().to(t.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow the model to another device, but not to another dtype: A, B and B₀ keep their precision."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Sizes and scale, for ``print(model)``."""
        return f"in={self.A.shape[1]}, out={self.B.shape[0]}, rank={self.rank}, scaling={self.scaling:.4g}"


def _dense(tensor: Tensor) -> Tensor:
    """A contiguous copy: a strided one would be summed in another order than the same numbers read from a file."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)
