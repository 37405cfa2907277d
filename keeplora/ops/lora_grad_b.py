"""lora_grad_b: gradients of all of a layer's B from one read of dy (kernels: csrc/{kernels,bind/cpu}/lora_grad_b)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keeplora.ops.check import float_list, matrix, same_length, wide
from keeplora.ops.declare import declare

__all__ = ["lora_grad_b"]

Span = tuple[int, int]


def lora_grad_b(
    dy: Tensor,
    t: Tensor,
    *,
    columns: Sequence[Span],
    rows: Sequence[Span],
    scale: Sequence[float] | float,
) -> list[Tensor]:
    r"""Gradients of the ``B`` factors of all adapters of a layer.

    $$ dB_i = c_i\, dy_{:,\,[s_i, e_i)}^T\, t_{:,\,[p_i, q_i)}, \qquad t = x\,[A_1; \dots; A_n]^T $$

    ``dy`` is read once, in its own dtype, for all adapters together. Sums are formed in float32 also where ``dy`` and
    ``t`` are in 16 bits, and handed out so.

    Args:
        dy: ``[tokens, out]``, gradient of the layer's output, any floating dtype.
        t: ``[tokens, Σ r_i]``, what the adapters' ``A`` made of the layer's input, any floating dtype.
        columns: ``n`` pairs ``(p, q)`` with ``0 <= p <= q <= Σ r_i``: the adapter's columns of ``t``.
        rows: ``n`` pairs ``(s, e)`` with ``0 <= s <= e <= out``: the adapter's rows of the weight. Adapters of a fused
            projection (q, k, v) name theirs; a plain layer has one with all.
        scale: ``c``, one number or one per adapter (LoRA's ``alpha / r`` times the depth scale).

    Returns:
        ``n`` matrices ``[e_i - s_i, q_i - p_i]``; float32, float64 if an input is float64.

    Raises:
        ValueError: lengths, shapes or ranges do not fit, or ``scale`` is not finite.
        TypeError: an argument is not a floating matrix.

    Not differentiable: it is itself a gradient. Its inputs count as constants.

    Source: the gradient of Hu et al., "LoRA", 2021, eq. 3, arXiv:2106.09685, with ``A`` frozen.

    Examples:
        >>> dy, t = torch.ones(3, 4), torch.tensor([[1.0], [2.0], [3.0]])
        >>> (db,) = lora_grad_b(dy, t, columns=[(0, 1)], rows=[(0, 2)], scale=0.5)
        >>> db.T
        tensor([[3., 3.]])
    """
    matrix("lora_grad_b", "dy", dy)
    matrix("lora_grad_b", "t", t)
    columns, rows = list(columns), list(rows)
    same_length("lora_grad_b", columns=columns, rows=rows)
    if t.shape[0] != dy.shape[0]:
        raise ValueError(
            f"lora_grad_b: t must have the tokens of dy, got {list(t.shape)} for dy {list(dy.shape)}. "
            "Flatten batch and sequence the same way."
        )
    if t.device != dy.device:
        raise ValueError(f"lora_grad_b: t must lie on the device of dy, got {t.device} for {dy.device}.")
    for name, spans, of, size in (("columns", columns, "t", t.shape[1]), ("rows", rows, "dy", dy.shape[1])):
        for i, (start, stop) in enumerate(spans):
            if not 0 <= start <= stop <= size:
                raise ValueError(
                    f"lora_grad_b: {name}[{i}] must satisfy 0 <= start <= stop <= {size} (columns of {of}), "
                    f"got ({start}, {stop})."
                )
    place = [bound for pairs in zip(columns, rows, strict=True) for pair in pairs for bound in pair]
    scales = float_list("lora_grad_b", "scale", scale, len(rows))
    db: list[Tensor] = _op.call(dy.detach(), t.detach(), place, scales)
    return db


# place: p, q, s, e of each adapter, one after the other.
def _reference(dy: Tensor, t: Tensor, place: list[int], scale: list[float]) -> list[Tensor]:
    acc = wide(dy.dtype, t.dtype)
    dy, t = dy.to(acc), t.to(acc)
    db = []
    for i, factor in enumerate(scale):
        p, q, s, e = place[4 * i : 4 * i + 4]
        db.append((dy[:, s:e].T @ t[:, p:q]) * factor)
    return db


def _fake(dy: Tensor, t: Tensor, place: list[int], scale: list[float]) -> list[Tensor]:
    acc = wide(dy.dtype, t.dtype)
    spans = [place[i : i + 4] for i in range(0, len(place), 4)]
    return [dy.new_empty((e - s, q - p), dtype=acc) for p, q, s, e in spans]


def _samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    return [
        (make(7, 6), make(7, 2), [0, 2, 0, 6], [1.0]),
        (make(9, 12), make(6, 9).T, [0, 2, 0, 4, 2, 5, 4, 8, 5, 6, 8, 12], [0.5, 1.0, -1.0]),
        (make(0, 3), make(0, 2), [0, 2, 1, 1], [1.0]),
    ]


_op = declare(
    "lora_grad_b(Tensor dy, Tensor t, int[] place, float[] scale) -> Tensor[]",
    reference=_reference,
    fake=_fake,
    samples=_samples,
)
