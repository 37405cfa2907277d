"""thin_matmul: products with a factor of few rows, as LoRA has them (kernel: csrc/bind/cpu/thin_matmul.cpp)."""

from typing import Any

import torch
from torch import Tensor

from keeplora.ops.check import float_list, matrix, wide
from keeplora.ops.declare import declare
from keeplora.ops.product import product

__all__ = ["thin_matmul"]


def thin_matmul(x: Tensor, a: Tensor, *, scale: float = 1.0) -> Tensor:
    r"""Product of a long matrix with the transpose of one of few rows.

    $$ y = c\, x\, a^T $$

    LoRA's ``t = x Aᵀ`` is ``thin_matmul(x, A)``; for the gradient of B there is ``lora_grad_b``. On a CPU ``x`` is read
    once, from where it lies, if its rows are contiguous (else it is copied); on a GPU, and where gradients are wanted,
    it is torch's product. The sums of float16 and bfloat16 inputs are formed in float32, those of gradients too.

    Args:
        x: ``[n, k]``, any floating dtype.
        a: ``[r, k]``, any floating dtype.
        scale: ``c``.

    Returns:
        ``[n, r]``; float32, float64 if an input is float64.

    Raises:
        ValueError: shapes or devices do not fit, or ``scale`` is not finite.
        TypeError: an argument is not a floating matrix.

    Source: the first product of a LoRA layer with frozen weight, Hu et al., "LoRA", 2021, eq. 3, arXiv:2106.09685.

    Examples:
        >>> x, a = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([[1.0, -1.0]])
        >>> thin_matmul(x, a, scale=2.0).T
        tensor([[-2., -2., -2.]])
    """
    matrix("thin_matmul", "x", x)
    matrix("thin_matmul", "a", a)
    if a.shape[1] != x.shape[1]:
        raise ValueError(
            f"thin_matmul: a must have as many columns as x, got {list(a.shape)} for {list(x.shape)}. "
            "Both are multiplied along their columns; transpose the one that is not."
        )
    if a.device != x.device:
        raise ValueError(f"thin_matmul: a must lie on the device of x, got {a.device} for {x.device}.")
    [factor] = float_list("thin_matmul", "scale", scale, 1)
    if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad):
        acc = wide(x.dtype, a.dtype)
        return product(x.to(acc), a.to(acc).T) * factor
    result: Tensor = _op.call(x, a, factor)
    return result


_LONG, _BLOCK = 1 << 15, 512
"""Sums of more terms than that are summed in blocks, as the kernels do: added one by one, small ones would be lost."""


def _reference(x: Tensor, a: Tensor, scale: float) -> Tensor:
    acc = wide(x.dtype, a.dtype)
    x, a = x.to(acc), a.to(acc)
    if x.shape[1] <= _LONG:
        return (x @ a.T) * scale
    pieces = zip(torch.split(x, _BLOCK, 1), torch.split(a, _BLOCK, 1), strict=True)
    return torch.stack([piece @ other.T for piece, other in pieces]).sum(0) * scale


def _fake(x: Tensor, a: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[0], dtype=wide(x.dtype, a.dtype))


def _samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    return [(make(7, 5), make(2, 5), 1.0), (make(5, 9).T, make(5, 17).T, -0.5), (make(0, 3), make(2, 3), 1.0)]


_op = declare(
    "thin_matmul(Tensor x, Tensor a, float scale) -> Tensor",
    reference=_reference,
    fake=_fake,
    samples=_samples,
)
