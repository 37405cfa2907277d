"""A product whose gradients are as exact as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keeplora.ops.precision import full_precision

__all__ = ["product"]


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of ``[…, m, k]`` and ``[…, k, n]`` in full precision, and gradients of any order, too.

    What autograd forms of a guarded product is computed in ``backward()``, where the guard is no longer open.

    Examples:
        >>> left = torch.ones(1, 2, requires_grad=True)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     product(left, torch.full((2, 1), 1.001)).backward()
        >>> left.grad
        tensor([[1.0010, 1.0010]])
    """
    result: Tensor = _Product.apply(left, right)
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        with full_precision(left):
            return left @ right

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        return (
            product(grad, right.mT).sum_to_size(left.shape) if ctx.needs_input_grad[0] else None,
            product(left.mT, grad).sum_to_size(right.shape) if ctx.needs_input_grad[1] else None,
        )
