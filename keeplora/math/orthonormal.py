"""Orthonormal columns: what a set of columns adds to a basis, and what a basis leaves free."""

from collections.abc import Sequence

import torch
from torch import Tensor

from keeplora.math import factorise
from keeplora.math.check import finite
from keeplora.ops.orthonormalize import orthonormalize

__all__ = ["complement", "nearest_orthonormal", "orthonormal_again", "reorthogonalize"]

ROWS = 1024
"""That are in float64 at a time."""


def reorthogonalize(y: Sequence[Tensor], q: Sequence[Tensor] | None = None) -> list[Tensor]:
    r"""The columns that ``y[i]`` adds to ``q[i]``, made orthonormal, dropped columns cut off.

    $$ Z^T Z = I, \quad Q^T Z = 0, \quad \mathrm{span}[Q, Z] = \mathrm{span}[Q, Y] $$

    Eigenvectors computed in float32 leak 1e-4 … 5e-3 into the space they were meant to avoid; after this
    1e-7.

    Args:
        y: ``[d_i, l_i]`` each, all float32 or all float64.
        q: ``[d_i, k_i]`` each with orthonormal columns; ``None`` for none.

    Returns:
        ``[d_i, l'_i]`` each, ``l'_i <= min(l_i, d_i - k_i)``. One transfer of the counts for all layers.

    Raises:
        ValueError, TypeError: as ``keeplora.ops.orthonormalize``, and where a value is NaN or infinite.

    Examples:
        >>> (z,) = reorthogonalize([torch.tensor([[1.0, 2.0], [1.0, 2.0]])], [torch.tensor([[1.0], [0.0]])])
        >>> z.abs()
        tensor([[0.],
                [1.]])
    """
    z, kept = orthonormalize(y, q)
    finite("reorthogonalize", "y", y)  # a column that is not would be one of those dropped
    finite("reorthogonalize", "q", q or [])
    return [columns[:, :count] for columns, count in zip(z, kept.tolist(), strict=True)]


def complement(q: Tensor) -> Tensor:
    r"""An orthonormal basis ``N`` of what the columns of ``q`` leave free.

    $$ N^T N = I, \qquad Q^T N = 0, \qquad Q Q^T + N N^T = I $$

    The trailing columns of the complete Householder QR of ``Q``; where that would loop over a batch, the eigenvectors
    of ``QQᵀ`` for its eigenvalue 0, in float64.

    Args:
        q: ``[d, k]`` or ``[n, d, k]`` with orthonormal columns, ``k <= d``, float32 or float64.

    Returns:
        ``[…, d, d - k]`` in the dtype of ``q``.

    Examples:
        >>> complement(torch.tensor([[1.0], [0.0]])).abs()
        tensor([[0.],
                [1.]])
    """
    d, k = q.shape[-2:]
    if k == 0:
        return torch.eye(d, dtype=q.dtype, device=q.device).expand(*q.shape[:-2], -1, -1)
    if d < factorise.plan_for(q.device.type).qr_from:
        wide = q.double()
        return factorise.symmetric_eigh(wide @ wide.mT)[1][..., : d - k].to(q.dtype)
    full: Tensor = torch.linalg.qr(q, mode="complete").Q
    return full[..., k:]


def nearest_orthonormal(y: Tensor) -> Tensor:
    r"""The orthonormal columns nearest to columns that are nearly so, by products alone.

    $$ Y \leftarrow Y\, (3 I - Y^T Y) / 2, \qquad \lVert Y^T Y - I \rVert = e \; \to \; \tfrac34 e^2 $$

    Two steps: 1e-3 becomes 4e-13. A column of zeros stays one, so bases of different width can be filled up with them.

    Args:
        y: ``[…, d, k]``, float64, every column orthonormal to the others to 1e-3, or zero.

    Source: Newton-Schulz iteration for the polar factor, Higham, "Functions of Matrices", 2008, sec. 8.3.

    Examples:
        >>> nearest_orthonormal(torch.tensor([[1.0001, 0.0], [0.0, 0.0]]).double()).float()
        tensor([[1., 0.],
                [0., 0.]])
    """
    for _ in range(2):
        y = 1.5 * y - y @ (y.mT @ y) / 2
    return y


def orthonormal_again(y: Tensor) -> Tensor:
    r"""The orthonormal columns nearest to columns that were so before they were rounded, in float32.

    $$ Y T, \qquad T = M (3 I - M G M) / 2, \quad M = (3 I - G) / 2, \quad G = Y^T Y $$

    That is [`nearest_orthonormal`][] with its two steps as one ``T [k, k]`` in float64: Y itself is never there in
    float64.

    Args:
        y: ``[d, k]`` in any dtype, every column orthonormal to the others to 1e-2.

    Returns:
        ``[d, k]``, float32. From float16 the entries of ``QᵀQ − I`` are some 1e-8.

    Examples:
        >>> orthonormal_again(torch.tensor([[1.001, 0.0], [0.0, 0.0], [0.0, 0.999]]))
        tensor([[1., 0.],
                [0., 0.],
                [0., 1.]])
    """
    d, k = y.shape
    gram = y.new_zeros(k, k, dtype=torch.float64)
    for rows in torch.split(y, ROWS):
        wide = rows.double()
        gram += wide.T @ wide
    turn = -gram / 2
    turn.diagonal().add_(1.5)
    inner = (turn @ gram @ turn).neg_().div_(2)
    inner.diagonal().add_(1.5)
    turn = turn @ inner
    q = y.new_empty(d, k, dtype=torch.float32)
    for into, rows in zip(torch.split(q, ROWS), torch.split(y, ROWS), strict=True):
        into.copy_(rows.double() @ turn)
    return q
