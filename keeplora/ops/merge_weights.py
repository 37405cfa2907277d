"""merge_weights: the effective weights of many LoRA layers in one call (kernel: csrc/kernels/merge_weights.h)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keeplora.ops.check import FLOATS, float_list, matrices, same_length, wide
from keeplora.ops.declare import declare
from keeplora.ops.product import product

__all__ = ["merge_weights"]


def merge_weights(
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *,
    scale: Sequence[float] | float,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    r"""Add the low-rank update to every weight and round once.

    .. math:: W^{\mathrm{eff}}_i = \mathrm{cast}(W_i + c_i\,B_i A_i)

    Args:
        w: ``n`` weights ``[out_i, in_i]``, any floating dtype each; row ranges of fused weights are views.
        a: ``n`` matrices ``[r_i, in_i]``, any floating dtype.
        b: ``n`` matrices ``[out_i, r_i]``, any floating dtype; ``r_i`` may be 0.
        scale: ``c``, one number or one per weight (LoRA's ``alpha / r`` times the depth scale).
        dtype: dtype of the results; that of each weight when ``None``.

    Returns:
        ``n`` new matrices ``[out_i, in_i]``. Sums are formed in float32, in float64 if an input is float64.

    Raises:
        ValueError: lengths or shapes do not fit, or ``scale`` is not finite.
        TypeError: an argument is not a sequence of floating matrices, or ``dtype`` is not a floating dtype.

    Differentiable in ``w``, ``a`` and ``b``: where gradients are wanted it is torch's product, and sums of gradients
    are formed in the same precision.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, sec. 4.1, arXiv:2106.09685.

    Example:
        >>> w, a, b = torch.eye(2), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0], [0.0]])
        >>> merge_weights([w], [a], [b], scale=0.5)
        [tensor([[1.0000, 0.5000],
                [0.0000, 1.0000]])]
    """
    w = matrices("merge_weights", "w", w, uniform=False)
    a = matrices("merge_weights", "a", a, uniform=False)
    b = matrices("merge_weights", "b", b, uniform=False)
    same_length("merge_weights", w=w, a=a, b=b)
    for i, (weight, down, up) in enumerate(zip(w, a, b, strict=True)):
        if weight.shape != (up.shape[0], down.shape[1]) or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"merge_weights: b[{i}] times a[{i}] must have the shape of w[{i}], got "
                f"{list(up.shape)} times {list(down.shape)} for {list(weight.shape)}."
            )
        if down.device != weight.device or up.device != weight.device:
            raise ValueError(
                f"merge_weights: a[{i}] and b[{i}] must lie on the device of w[{i}], got {down.device} and "
                f"{up.device} for {weight.device}."
            )
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"merge_weights: dtype must be a floating dtype, got {dtype}.")
    scales = float_list("merge_weights", "scale", scale, len(w))
    if torch.is_grad_enabled() and any(matrix.requires_grad for matrix in (*w, *a, *b)):
        return [_merged(*layer, dtype) for layer in zip(w, a, b, scales, strict=True)]
    merged: list[Tensor] = _op.call(w, a, b, scales, dtype)
    return merged


def _merged(w: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype | None) -> Tensor:
    acc = wide(w.dtype, a.dtype, b.dtype)
    total = torch.add(w.to(acc), product(b.to(acc), a.to(acc)), alpha=scale)
    return total.to(dtype or w.dtype)


def _reference(
    w: list[Tensor], a: list[Tensor], b: list[Tensor], scale: list[float], dtype: torch.dtype | None
) -> list[Tensor]:
    merged = []
    for weight, down, up, factor in zip(w, a, b, scale, strict=True):
        acc = wide(weight.dtype, down.dtype, up.dtype)
        total = torch.addmm(weight.to(acc), up.to(acc), down.to(acc), alpha=factor)
        merged.append(total.to(dtype or weight.dtype))
    return merged


def _fake(
    w: list[Tensor], a: list[Tensor], b: list[Tensor], scale: list[float], dtype: torch.dtype | None
) -> list[Tensor]:
    return [torch.empty_like(x, dtype=dtype or x.dtype, memory_format=torch.contiguous_format) for x in w]


def _samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    return [
        ([make(4, 6)], [make(2, 6)], [make(4, 2)], [0.5], None),
        (
            [make(3, 5), make(1, 1)],
            [make(0, 5), make(3, 1)],
            [make(3, 0), make(1, 3)],
            [1.0, -2.0],
            torch.bfloat16,
        ),
    ]


_op = declare(
    "merge_weights(Tensor[] w, Tensor[] a, Tensor[] b, float[] scale, ScalarType? dtype) -> Tensor[]",
    reference=_reference,
    fake=_fake,
    samples=_samples,
)
