"""merge_weights: the effective weights of many LoRA layers at once (kernels: csrc/{kernels,bind/cpu}/merge_weights)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keeplora.ops.check import FLOATS, float_list, matrices, same_length, wide
from keeplora.ops.declare import declare
from keeplora.ops.product import product

__all__ = ["merge_weights"]

Place = tuple[int, int, int]


def merge_weights(
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *,
    scale: Sequence[float] | float,
    places: Sequence[Place] | None = None,
    origin: Sequence[Tensor | None] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    r"""Add the low-rank updates to every weight and round once.

    $$ W^{\mathrm{eff}}_k = \mathrm{cast}\Bigl(W_k + \sum_{j\ \text{of}\ k} c_j\,E_j (B_j - B_{0,j}) A_j\Bigr) $$

    ``E_j`` places an adapter in its rows of the weight; no row has two. One call merges any mixture of fused and plain
    weights, and on a GPU is one launch for up to 339 row ranges and A's.

    Args:
        w: ``m`` weights ``[out_k, in_k]``, any floating dtype each; row ranges of fused weights may be views.
        a: ``n`` matrices ``[r_j, in_k]``, any floating dtype.
        b: ``n`` matrices ``[rows of the adapter, r_j]``, any floating dtype; ``r_j`` may be 0.
        scale: ``c``, one number or one per adapter (LoRA's ``alpha / r`` times the depth scale).
        places: ``n`` triples ``(k, start, stop)``: adapter j belongs to rows ``[start, stop)`` of weight k. None:
            adapter j to all rows of weight j.
        origin: ``B₀``, one matrix of ``b``'s shape or None per adapter; None where there is none at all.
        dtype: dtype of the results; that of each weight when ``None``.

    Returns:
        ``m`` new matrices ``[out_k, in_k]``. Sums are formed in float32, in float64 if an input to them is float64. For
        bfloat16 results of float32 sums the kernel for GPUs rounds ``B − B₀`` and A to TF32's 11 bits, which adds at
        most ``2⁻¹⁰ c |B − B₀| |A|`` (of the sizes): less than rounding to bfloat16 where the update is the smaller.

    Raises:
        ValueError: lengths or shapes do not fit, rows overlap, or ``scale`` is not finite.
        TypeError: an argument is not a sequence of floating matrices, or ``dtype`` is not a floating dtype.

    Differentiable in ``w``, ``a``, ``b`` and ``origin``: where gradients are wanted it is torch's product, and sums of
    gradients are formed in the same precision.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, sec. 4.1, arXiv:2106.09685.

    Examples:
        >>> w, a, b = torch.eye(2), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0], [0.0]])
        >>> merge_weights([w], [a], [b], scale=0.5)
        [tensor([[1.0000, 0.5000],
                [0.0000, 1.0000]])]
    """
    w = matrices("merge_weights", "w", w, uniform=False)
    a = matrices("merge_weights", "a", a, uniform=False)
    b = matrices("merge_weights", "b", b, uniform=False)
    if places is None:
        same_length("merge_weights", w=w, a=a, b=b)
        places = [(i, 0, len(weight)) for i, weight in enumerate(w)]
    places = list(places)
    same_length("merge_weights", a=a, b=b, places=places)
    starts = [None] * len(b) if origin is None else list(origin)
    same_length("merge_weights", b=b, origin=starts)
    matrices("merge_weights", "origin", [start for start in starts if start is not None], uniform=False)
    _check_places(w, places)
    for i, ((k, start, stop), down, up, b0) in enumerate(zip(places, a, b, starts, strict=True)):
        if (stop - start, w[k].shape[1]) != (up.shape[0], down.shape[1]) or up.shape[1] != down.shape[0]:
            rows = f"w[{k}]" if stop - start == len(w[k]) else f"w[{k}][{start}:{stop}]"
            raise ValueError(
                f"merge_weights: b[{i}] times a[{i}] must have the shape of {rows}, got "
                f"{list(up.shape)} times {list(down.shape)} for {[stop - start, w[k].shape[1]]}."
            )
        if b0 is not None and b0.shape != up.shape:
            raise ValueError(
                f"merge_weights: origin[{i}] must have the shape of b[{i}], got {list(b0.shape)} for {list(up.shape)}."
            )
        if any(m.device != w[k].device for m in (down, up, *([] if b0 is None else [b0]))):
            raise ValueError(
                f"merge_weights: a[{i}], b[{i}] and origin[{i}] must lie on the device of w[{k}], got {down.device}, "
                f"{up.device} and {None if b0 is None else b0.device} for {w[k].device}."
            )
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"merge_weights: dtype must be a floating dtype, got {dtype}.")
    scales = float_list("merge_weights", "scale", scale, len(a))
    given = [start for start in starts if start is not None]
    if torch.is_grad_enabled() and any(matrix.requires_grad for matrix in (*w, *a, *b, *given)):
        return _merged(w, a, b, starts, places, scales, dtype)
    merged: list[Tensor] = _op.call(w, a, b, *arguments(places, starts), scales, False, dtype)[0]
    return merged


def _check_places(w: Sequence[Tensor], places: Sequence[Place]) -> None:
    taken: dict[int, list[tuple[int, int, int]]] = {}
    for i, (k, start, stop) in enumerate(places):
        if not (0 <= k < len(w) and 0 <= start <= stop <= len(w[k])):
            rows = f"0 <= start <= stop <= {len(w[k])}" if 0 <= k < len(w) else f"0 <= weight < {len(w)}"
            raise ValueError(f"merge_weights: places[{i}] must satisfy {rows}, got {(k, start, stop)}.")
        if start < stop:
            taken.setdefault(k, []).append((start, stop, i))
    for k, spans in taken.items():
        spans.sort()
        for (_, stop, i), (start, _, j) in pairwise(spans):
            if start < stop:
                raise ValueError(
                    f"merge_weights: places must not overlap, got rows up to {stop} and from {start} on of w[{k}] at "
                    f"places[{i}] and places[{j}]."
                )


def arguments(places: Sequence[Place], starts: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """``origin`` and ``place`` of the op."""
    origin: list[Tensor] = []
    place: list[int] = []
    for (k, start, stop), b0 in zip(places, starts, strict=True):
        place += (k, start, stop, -1 if b0 is None else len(origin))
        if b0 is not None:
            origin.append(b0)
    return origin, place


def _merged(
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    starts: Sequence[Tensor | None],
    places: Sequence[Place],
    scales: Sequence[float],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    merged = []
    for k, weight in enumerate(w):
        mine = [j for j, place in enumerate(places) if place[0] == k]
        acc = _acc(weight, a, b, starts, mine)
        total = weight.to(acc)
        for j in mine:
            up, b0 = b[j].to(acc), starts[j]
            update = product(up if b0 is None else up - b0.to(acc), a[j].to(acc))
            total = torch.add(total, F.pad(update, (0, 0, places[j][1], len(weight) - places[j][2])), alpha=scales[j])
        merged.append(total.to(dtype or weight.dtype))
    return merged


def _acc(
    weight: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], starts: Sequence[Tensor | None], mine: Sequence[int]
) -> torch.dtype:
    others = [matrix.dtype for j in mine for matrix in (a[j], b[j], starts[j]) if matrix is not None]
    return wide(weight.dtype, *others)


# place: of each adapter its weight, its first row and the one after its last, and which of `origin` it has, or -1.
# stack: the second result is [A_1; ..; A_n] of each weight in the dtype of the first, which a layer's x Aᵀ needs too.
def _reference(
    w: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    origin: list[Tensor],
    place: list[int],
    scale: list[float],
    stack: bool,
    dtype: torch.dtype | None,
) -> tuple[list[Tensor], list[Tensor]]:
    places = [place[i : i + 4] for i in range(0, len(place), 4)]
    starts = [None if which < 0 else origin[which] for *_, which in places]
    merged, stacked = [], []
    for k, weight in enumerate(w):
        mine = [j for j, (of, *_) in enumerate(places) if of == k]
        acc = _acc(weight, a, b, starts, mine)
        total = weight.to(acc, copy=True, memory_format=torch.contiguous_format)
        for j in mine:
            _, start, stop, which = places[j]
            up = b[j].to(acc) if which < 0 else b[j].to(acc) - origin[which].to(acc)
            total[start:stop].addmm_(up, a[j].to(acc), alpha=scale[j])
        merged.append(total.to(dtype or weight.dtype))
        rows = [weight.new_empty(0, weight.shape[1]), *(a[j] for j in mine)]
        stacked.append(torch.cat([m.to(dtype or weight.dtype) for m in rows]))
    return merged, stacked if stack else []


def _fake(
    w: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    origin: list[Tensor],
    place: list[int],
    scale: list[float],
    stack: bool,
    dtype: torch.dtype | None,
) -> tuple[list[Tensor], list[Tensor]]:
    merged = [torch.empty_like(x, dtype=dtype or x.dtype, memory_format=torch.contiguous_format) for x in w]
    if not stack:
        return merged, []
    ranks = [sum(down.shape[0] for j, down in enumerate(a) if place[4 * j] == k) for k in range(len(w))]
    return merged, [x.new_empty(r, x.shape[1], dtype=dtype or x.dtype) for x, r in zip(w, ranks, strict=True)]


def _samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    return [
        ([make(4, 6)], [make(2, 6)], [make(4, 2)], [], [0, 0, 4, -1], [0.5], False, None),
        (
            [make(3, 5), make(1, 1)],
            [make(0, 5), make(3, 1)],
            [make(3, 0), make(1, 3)],
            [make(1, 3)],
            [0, 0, 3, -1, 1, 0, 1, 0],
            [1.0, -2.0],
            False,
            torch.bfloat16,
        ),
        (
            [make(9, 50), make(2, 3)],
            [make(2, 50), make(3, 50)],
            [make(2, 2), make(4, 3)],
            [make(4, 3), make(2, 2)],
            [0, 7, 9, 1, 0, 1, 5, 0],
            [0.5, -1.0],
            True,
            None,
        ),
    ]


_op = declare(
    "merge_weights(Tensor[] w, Tensor[] a, Tensor[] b, Tensor[] origin, int[] place, float[] scale, bool stack, "
    "ScalarType? dtype) -> (Tensor[], Tensor[])",
    reference=_reference,
    fake=_fake,
    samples=_samples,
)
