"""orthonormalize: orthonormal columns, also against a basis, with a rank."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keeplora.ops.check import MASTER, matrices, orthonormal, same_length
from keeplora.ops.declare import declare
from keeplora.ops.outside import inside, outside
from keeplora.ops.samples import random_basis

__all__ = ["orthonormalize"]

# A column is kept when what is left of it exceeds this many eps of its own length: below that, what is left
# is the rounding of the column's own entries and of the subtraction, not a direction the caller meant.
KEPT_EPS = 32
# Where this much of every column is left, one projection left no more of q in it than the last one takes out.
ENOUGH_LEFT = 1e-3
ORDINARY = 1e9  # lengths up to this and down to its inverse: squares of all that comes of them are numbers of float32


def orthonormalize(
    y: Sequence[Tensor], q: Sequence[Tensor] | None = None, *, check_basis: bool = False
) -> tuple[list[Tensor], Tensor]:
    r"""Orthonormal columns spanning what the columns of ``y[i]`` add to those of ``q[i]``.

    $$
    Z_i^T Z_i = I, \qquad Q_i^T Z_i = 0, \qquad
    \mathrm{span}[Q_i, Z_i] = \mathrm{span}[Q_i, Y_i]
    $$

    Columns are taken from left to right. One is dropped when the part of it outside ``q[i]`` and the columns
    kept before is at most ``32 eps`` of its length: zero columns, repeated columns and columns inside
    ``q[i]`` go. A column that is NaN or infinite would go, too: where there is one, in ``y[i]`` or ``q[i]``, all of
    ``z[i]`` is NaN.

    Args:
        y: ``n`` matrices ``[d_i, l_i]``, all float32 or all float64.
        q: ``n`` matrices ``[d_i, k_i]`` with orthonormal columns, dtype of ``y``; ``None`` for none.
        check_basis: also check that the columns of every ``q[i]`` are orthonormal. Waits for the device.

    Returns:
        ``(z, rank)``: ``n`` matrices ``[d_i, l_i]`` whose first ``rank[i]`` columns are orthonormal to 5e-6
        in float32 for any condition of ``y[i]``, the others exactly zero; ``rank`` is ``[n]`` int64 on the
        device of ``y``. Where ``y[i]`` or ``q[i]`` is not finite, ``z[i]`` is NaN and ``rank[i]`` is ``l_i``. Nothing
        waits for the device.

    Raises:
        ValueError: lengths or shapes do not fit, or a checked basis has ``max|QᵀQ - I|`` above 1e-4 (float64:
            1e-10).
        TypeError: an argument is not a sequence of float32 or of float64 matrices.

    Not differentiable: its inputs count as constants.

    Source: projection "twice is enough", Giraud, Langou & Rozloznik, 2005; CholeskyQR as the second
    orthonormalisation, Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm", 2015.

    Examples:
        >>> y = torch.tensor([[2.0, 4.0, 1.0], [0.0, 0.0, 1.0]])
        >>> (z,), rank = orthonormalize([y])
        >>> rank, z.abs()
        (tensor([2]), tensor([[1., 0., 0.],
                [0., 1., 0.]]))
    """
    y = matrices("orthonormalize", "y", y, MASTER)
    q = [m.new_empty(m.shape[0], 0) for m in y] if q is None else matrices("orthonormalize", "q", q, MASTER)
    same_length("orthonormalize", y=y, q=q)
    for i, (columns, basis) in enumerate(zip(y, q, strict=True)):
        if columns.shape[0] != basis.shape[0]:
            raise ValueError(
                f"orthonormalize: q[{i}] must have the rows of y[{i}], got {list(basis.shape)} for "
                f"{list(columns.shape)}."
            )
        if columns.dtype != basis.dtype or columns.device != basis.device:
            raise TypeError(
                f"orthonormalize: q[{i}] must have the dtype and device of y[{i}], got {basis.dtype} on "
                f"{basis.device} for {columns.dtype} on {columns.device}."
            )
    if check_basis:
        orthonormal("orthonormalize", q)
    y, q = [m.detach() for m in y], [m.detach() for m in q]
    z, rank = _op.call(y, q)
    return _visibly(z, rank, y, q) if z else (z, rank)


def _visibly(z: list[Tensor], rank: Tensor, y: Sequence[Tensor], q: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """NaN, and every column, for problems that have a number which is none: comparing with it drops columns."""
    if z[0].device.type == "cpu" and not torch.compiler.is_compiling() and _full(z, rank):
        return z, rank
    sizes = [_largest(y), _largest(q)]
    finite = torch.stack([torch.stack(each).isfinite() for each in sizes]).all(0)
    torch._foreach_add_(z, list(torch.where(finite, 0.0, torch.nan).to(z[0].dtype).unbind()))
    widths = torch.stack([rank.new_full((), m.shape[1]) for m in z])
    return z, torch.where(finite, rank, widths)


def _full(z: Sequence[Tensor], rank: Tensor) -> bool:
    return rank.tolist() == [m.shape[1] for m in z]


def _largest(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The size of every one's largest entry, in one launch for all; a NaN is larger than any other number."""
    full = [m for m in matrices if m.numel()]
    norms = iter(torch._foreach_norm(full, torch.inf) if full else [])
    return [next(norms) if m.numel() else m.new_zeros(()) for m in matrices]


def _reference(y: list[Tensor], q: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    done = [_one(columns, basis) for columns, basis in zip(y, q, strict=True)]
    ranks = [rank for _, rank in done]
    return [z for z, _ in done], torch.stack(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


def _one(y: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    width, smallest = y.shape[1], KEPT_EPS * torch.finfo(y.dtype).eps
    length = torch.linalg.vector_norm(y, dim=0)
    if y.numel() and not bool(((length > 1 / ORDINARY) & (length < ORDINARY)).all()):
        y = _near_one(y)
        length = torch.linalg.vector_norm(y, dim=0)
    left = y
    for least in (ENOUGH_LEFT, smallest):
        left = _without(left, q)
        # With more columns some are dependent, and what rounding leaves of them can look like more.
        if 0 < width <= y.shape[0] - q.shape[1]:
            z, r = torch.linalg.qr(left)
            if bool((r.diagonal().abs() > least * length).all()):
                return _leave(z, q), torch.tensor(width, device=y.device)
    return _column_by_column(left, q, smallest * length)


def _near_one(y: Tensor) -> Tensor:
    """Columns times the powers of two that bring their largest entries near 1, which rounds nothing."""
    largest = y.abs().amax(dim=0).clamp_min(torch.finfo(y.dtype).tiny)
    return y * (torch.frexp(largest).mantissa / largest)


def _without(y: Tensor, q: Tensor) -> Tensor:
    return outside(y.T, q).T


def _leave(z: Tensor, q: Tensor) -> Tensor:
    """Orthonormal columns without what a small remainder, normalised, leaks into q."""
    leak = inside(z.T, q)
    if bool(leak.square().sum() <= torch.finfo(z.dtype).eps):  # without it they are still orthonormal
        return outside(z.T, q, leak).T.contiguous()
    return _polish(z, q)


def _polish(z: Tensor, q: Tensor) -> Tensor:
    # Normalising a small remainder enlarges its leak into q and, with Gram-Schmidt, into its neighbours: take
    # both out once more. z is orthonormal to a few percent here, so one Cholesky factor is exact enough.
    z = _without(z, q)
    factor = torch.linalg.cholesky(z.T @ z)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=z.dtype, device=z.device), upper=False)
    polished: Tensor = z @ inverse.T
    return polished


def _column_by_column(y: Tensor, q: Tensor, smallest: Tensor) -> tuple[Tensor, Tensor]:
    # A factorisation without column choice would put arbitrary directions in the place of dependent columns.
    z = torch.zeros_like(y, memory_format=torch.contiguous_format)
    rank = 0
    for j in range(y.shape[1]):
        column = y[:, j : j + 1]
        for _ in range(2):
            column = _without(_without(column, q), z[:, :rank])
        length = torch.linalg.vector_norm(column)
        if bool(length > smallest[j]):
            z[:, rank : rank + 1] = column / length
            rank += 1
    z[:, :rank] = _polish(z[:, :rank], q)
    return z, torch.tensor(rank, device=y.device)


def _fake(y: list[Tensor], q: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    z = [torch.empty_like(m, memory_format=torch.contiguous_format) for m in y]
    return z, torch.empty(len(y), dtype=torch.int64, device=y[0].device if y else "cpu")


def _samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    repeated = make(9, 2)
    return [
        ([make(6, 3)], [random_basis(6, 2, device, dtype)]),
        (
            [make(5, 5), repeated[:, [0, 0, 1]], make(4, 0)],
            [
                random_basis(5, 0, device, dtype),
                random_basis(9, 3, device, dtype),
                random_basis(4, 4, device, dtype),
            ],
        ),
    ]


_op = declare(
    "orthonormalize(Tensor[] y, Tensor[] q) -> (Tensor[], Tensor)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
)
