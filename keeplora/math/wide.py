"""Products in float64 of matrices in float32, from a portion at a time: a copy of all in float64 is never there."""

import torch
from torch import Tensor

__all__ = ["wide_gram", "wide_image"]


def wide_gram(factor: Tensor) -> Tensor:
    """``FᵀF`` in float64 of every ``F [n, rows, columns]``, from as many rows at a time as there are columns.

    Examples:
        >>> wide_gram(torch.ones(1, 3, 1))
        tensor([[[3.]]], dtype=torch.float64)
    """
    n, _, columns = factor.shape
    total = factor.new_zeros(n, columns, columns, dtype=torch.float64)
    for portion in torch.split(factor, max(1, columns), dim=1):
        _add(total, portion.double())
    return total


def _add(total: Tensor, rows: Tensor) -> None:
    total.baddbmm_(rows.mT, rows)


def wide_image(matrix: Tensor, v: Tensor) -> Tensor:
    """``Mᵀ V`` in the dtype of ``M [rows, columns]``, formed in that of V ``[rows, k]``, for as many columns at a time
    as there are rows.

    Examples:
        >>> wide_image(torch.eye(2)[:, :1], torch.tensor([[2.0], [3.0]]).double())
        tensor([[2.]])
    """
    portions = torch.split(matrix, max(1, len(matrix)), dim=1)
    return torch.cat([(portion.to(v.dtype).T @ v).to(matrix.dtype) for portion in portions])
