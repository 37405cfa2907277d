"""lora_grad_b: gradients of LoRA's B from one read of x and one of dy (kernel: csrc/kernels/lora_grad_b.h)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keeplora.ops.check import float_list, matrices, matrix, same_length, wide
from keeplora.ops.declare import declare

__all__ = ["lora_grad_b"]


def lora_grad_b(
    x: Tensor,
    dy: Tensor,
    a: Sequence[Tensor],
    *,
    rows: Sequence[tuple[int, int]],
    scale: Sequence[float] | float,
) -> tuple[Tensor, list[Tensor]]:
    r"""Gradients of the ``B`` factors of all adapters that share the input ``x``.

    .. math:: t = x\,[A_1; \dots; A_n]^T, \qquad dB_i = c_i\, dy_{:,\,[s_i, e_i)}^T\, t_i

    Adapters of a fused projection (q, k, v) name their output rows in ``rows``; a plain layer has one.

    Args:
        x: ``[tokens, in]``, any floating dtype.
        dy: ``[tokens, out]``, gradient of the layer's output, any floating dtype.
        a: ``n`` matrices ``[r_i, in]``, one floating dtype.
        rows: ``n`` pairs ``(start, stop)`` with ``0 <= start <= stop <= out``: the adapter's rows of
            the weight.
        scale: ``c``, one number or one per adapter (LoRA's ``alpha / r`` times the depth scale).

    Returns:
        ``(t, db)``: ``t`` is ``[tokens, Σ r_i]``, ``db[i]`` is ``[stop_i - start_i, r_i]``; float32, float64
        if an input is float64.

    Raises:
        ValueError: lengths, shapes or row ranges do not fit, or ``scale`` is not finite.
        TypeError: an argument is not floating, or ``a`` is not a sequence of matrices.

    Not differentiable: it is itself a gradient. Its inputs count as constants.

    Source: the gradient of Hu et al., "LoRA", 2021, eq. 3, arXiv:2106.09685, with ``A`` frozen.

    Example:
        >>> x, dy, a = torch.ones(3, 2), torch.ones(3, 4), torch.tensor([[1.0, 2.0]])
        >>> t, (db,) = lora_grad_b(x, dy, [a], rows=[(0, 2)], scale=0.5)
        >>> t.T, db.T
        (tensor([[3., 3., 3.]]), tensor([[4.5000, 4.5000]]))
    """
    matrix("lora_grad_b", "x", x)
    matrix("lora_grad_b", "dy", dy)
    a = matrices("lora_grad_b", "a", a)
    rows = list(rows)
    same_length("lora_grad_b", a=a, rows=rows)
    if x.shape[0] != dy.shape[0]:
        raise ValueError(
            f"lora_grad_b: dy must have the tokens of x, got {list(dy.shape)} for x {list(x.shape)}. "
            "Flatten batch and sequence the same way."
        )
    for name, value in (("dy", dy), ("a", a[0] if a else x)):
        if value.device != x.device:
            raise ValueError(f"lora_grad_b: {name} must lie on the device of x, got {value.device} for {x.device}.")
    for i, (down, (start, stop)) in enumerate(zip(a, rows, strict=True)):
        if down.shape[1] != x.shape[1]:
            raise ValueError(
                f"lora_grad_b: a[{i}] must have as many columns as x, got {list(down.shape)} for {list(x.shape)}."
            )
        if not 0 <= start <= stop <= dy.shape[1]:
            raise ValueError(
                f"lora_grad_b: rows[{i}] must satisfy 0 <= start <= stop <= {dy.shape[1]} (columns of dy), "
                f"got ({start}, {stop})."
            )
    bounds = [bound for pair in rows for bound in pair]
    scales = float_list("lora_grad_b", "scale", scale, len(a))
    t, db = _op.call(x.detach(), dy.detach(), [down.detach() for down in a], bounds, scales)
    return t, db


def _reference(
    x: Tensor, dy: Tensor, a: list[Tensor], rows: list[int], scale: list[float]
) -> tuple[Tensor, list[Tensor]]:
    acc = wide(x.dtype, dy.dtype, *(down.dtype for down in a))
    t = x.to(acc) @ torch.cat(a).to(acc).T if a else x.new_zeros(x.shape[0], 0, dtype=acc)
    db = []
    begin = 0
    for i, (down, factor) in enumerate(zip(a, scale, strict=True)):
        end = begin + down.shape[0]
        mine = dy[:, rows[2 * i] : rows[2 * i + 1]].to(acc)
        db.append((mine.T @ t[:, begin:end]) * factor)
        begin = end
    return t, db


def _fake(x: Tensor, dy: Tensor, a: list[Tensor], rows: list[int], scale: list[float]) -> tuple[Tensor, list[Tensor]]:
    acc = wide(x.dtype, dy.dtype, *(down.dtype for down in a))
    t = x.new_empty(x.shape[0], sum(down.shape[0] for down in a), dtype=acc)
    sizes = [(rows[2 * i + 1] - rows[2 * i], down.shape[0]) for i, down in enumerate(a)]
    return t, [x.new_empty(size, dtype=acc) for size in sizes]


def _samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    return [
        (make(7, 5), make(7, 6), [make(2, 5)], [0, 6], [1.0]),
        (
            make(9, 5),
            make(9, 12),
            [make(2, 5), make(3, 5), make(1, 5)],
            [0, 4, 4, 8, 8, 12],
            [0.5, 1.0, -1.0],
        ),
        (make(0, 5), make(0, 3), [make(2, 5)], [1, 1], [1.0]),
    ]


_op = declare(
    "lora_grad_b(Tensor x, Tensor dy, Tensor[] a, int[] rows, float[] scale) -> (Tensor, Tensor[])",
    reference=_reference,
    fake=_fake,
    samples=_samples,
)
