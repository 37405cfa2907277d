"""An adapter that starts at an update of its own without changing the function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from keeplora.lora import LoraAdapter
from keeplora.lora.adapter import compute_dtype

__all__ = ["StartedAdapter"]


class StartedAdapter(LoraAdapter):
    r"""An adapter whose A and B start away from zero, and whose update counts from there.

    $$ \Delta W = c\,(B A - B_0 A_0) = c\,\bigl((B - B_0)\,A + B_0\,(A - A_0)\bigr) $$

    PEFT takes $c B_0 A_0$ out of the frozen weight, which rounds it. Here the weight stays as it is, and the
    second form is 0 to the last bit when the task begins.

    Args:
        a: As of ``keeplora.lora.LoraAdapter``; both are trained.
        b: As of ``keeplora.lora.LoraAdapter``; both are trained.
        scaling: As of ``keeplora.lora.LoraAdapter``; both are trained.
        dropout: As of ``keeplora.lora.LoraAdapter``; both are trained.
        start: A₀ ``[r, in]``.
        origin: B₀ ``[out, r]``.

    Raises:
        ValueError: A₀ and B₀ are not of the shapes of A and B.
    """

    start: Tensor
    origin: Tensor

    def __init__(self, a: Tensor, b: Tensor, scaling: float, *, start: Tensor, origin: Tensor, dropout: float = 0.0):
        super().__init__(a, b, scaling, train_a=True, dropout=dropout, origin=origin)
        if (start.shape, origin.shape) != (a.shape, b.shape):
            raise ValueError(
                f"StartedAdapter: start and origin must be {list(a.shape)} and {list(b.shape)}, got "
                f"{list(start.shape)} and {list(origin.shape)}"
            )
        self.register_buffer("start", start.detach().clone(memory_format=torch.contiguous_format))

    def trained(self) -> tuple[Tensor, Tensor]:
        """A and B as they are now."""
        return self.A, self.B

    def factors(self) -> tuple[Tensor, Tensor]:
        """``[A; A − A₀] [2r, in]`` and ``[B − B₀, B₀] [out, 2r]``: their product is the update."""
        a, b = self.trained()
        return torch.cat([a, a - self.start]), torch.cat([b - self.origin, self.origin], dim=1)

    def plain(self) -> LoraAdapter:
        return LoraAdapter(*self.factors(), self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(compute_dtype(x))
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        a, b = self.factors()
        t = F.linear(x, a.to(x.dtype)) * self.scaling
        return F.linear(t, b.to(t.dtype))
