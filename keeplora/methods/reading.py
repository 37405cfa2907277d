"""What may stand in a state: tensors of a shape, orthonormal bases, counts and names; everything else is refused."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .bases import NARROW, joined
from .state import State, StateError

__all__ = [
    "is_counts", "is_figures", "is_names", "is_shares", "stored", "stored_basis", "stored_like", "stored_parts",
]  # fmt: skip


def stored(
    state: State,
    name: str,
    shape: Sequence[int | None],
    *,
    whole: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The state's tensor ``name``; None in ``shape`` is any size.

    Args:
        whole: Whether it holds whole numbers; otherwise float32 or float64.
        dtype: Which of the two, where that is known.

    Raises:
        StateError: it is missing, of another shape or dtype, or not finite.
    """
    tensor = state.tensors.get(name)
    fits = (
        tensor is not None
        and tensor.dim() == len(shape)
        and all(want in (None, size) for want, size in zip(shape, tensor.shape, strict=True))
    )
    if tensor is None or not fits:
        got = None if tensor is None else list(tensor.shape)
        raise StateError(f"load_state: {name} must have shape {list(shape)}, got {got}")
    either = (torch.int64, torch.int32) if whole else (torch.float32, torch.float64)
    kinds = either if dtype is None else (dtype,)
    if tensor.dtype not in kinds:
        raise StateError(f"load_state: {name} must be {' or '.join(map(str, kinds))}, got {tensor.dtype}")
    if not bool(torch.isfinite(tensor).all()):
        raise StateError(f"load_state: {name} must be finite, got NaN or Inf")
    return tensor


def stored_basis(state: State, name: str, width: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """The state's orthonormal columns ``name [width, k]``: what else they were, nothing would be protected by them.

    Raises:
        StateError: as ``stored``, or they are not orthonormal (by one random combination: it costs one product).
    """
    basis = stored(state, name, (width, None), dtype=dtype)
    _require_orthonormal(name, basis)
    return basis


def stored_parts(
    state: State, name: str, width: int | None, counts: Sequence[int | None], *, narrow: bool
) -> tuple[list[Tensor], Tensor]:
    """The state's columns that are saved as ``name.0 [width, counts[0]]``, ``name.1`` and so on, and all together.

    Args:
        width: None for any. counts: None for any.
        narrow: Whether the first part is in float16 (``keeplora.methods.bases``).

    Raises:
        StateError: as ``stored_basis``.
    """
    dtype = torch.float32 if narrow else None
    parts = [stored(state, f"{name}.0", (width, counts[0]), dtype=NARROW if narrow else None)]
    if narrow:
        _require_orthonormal(f"{name}.0", parts[0], most=1e-2)  # else nothing orthonormal can be made of it
    for i, count in enumerate(counts[1:], 1):
        parts.append(stored(state, f"{name}.{i}", (len(parts[0]), count), dtype=dtype or parts[0].dtype))
    basis = joined(parts)
    _require_orthonormal(name, basis)
    return parts, basis


def _require_orthonormal(name: str, basis: Tensor, most: float = 1e-3) -> None:
    width = basis.shape[0]
    drawn = torch.randn(basis.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide, mix = basis.double(), drawn.to(basis.device)
    off = float(((wide.T @ (wide @ mix)) - mix).abs().max()) if basis.shape[1] else 0.0
    if basis.shape[1] > width or off > most:
        raise StateError(f"load_state: {name} must have orthonormal columns, got some that are off by {off:.1e}")


def stored_like(state: State, name: str, own: Tensor) -> Tensor:
    """The state's tensor ``name``, of the shape and dtype of the model's ``own``.

    Raises:
        StateError: it is missing, of another shape or dtype, or not finite where the model's is.
    """
    tensor = state.tensors.get(name)
    if tensor is None or (tensor.shape, tensor.dtype) != (own.shape, own.dtype):
        got = None if tensor is None else f"{list(tensor.shape)} in {tensor.dtype}"
        raise StateError(f"load_state: {name} must be {list(own.shape)} in {own.dtype}, got {got}")
    finite = torch.isfinite(tensor)
    if not bool(finite.all()) and not bool((finite | ~torch.isfinite(own.to(tensor.device))).all()):  # as masks are
        raise StateError(f"load_state: {name} must be finite, got NaN or Inf")
    return tensor


def is_counts(value: Any, rows: int, columns: int | None = None) -> TypeGuard[list[list[int]]]:
    """Whether a JSON value is that many lists of whole numbers, at least 0, each of that length."""
    return (
        isinstance(value, list)
        and len(value) == rows
        and all(isinstance(row, list) and columns in (None, len(row)) for row in value)
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for row in value for n in row)
    )


def is_shares(value: Any, rows: int, columns: int) -> TypeGuard[list[list[float | None]]]:
    """Whether a JSON value is that many lists of numbers in [0, 1], or null, each of that length."""
    return (
        isinstance(value, list)
        and len(value) == rows
        and all(isinstance(row, list) and len(row) == columns for row in value)
        and all(n is None or (type(n) in (int, float) and 0 <= n <= 1) for row in value for n in row)
    )


def is_names(value: Any) -> TypeGuard[list[str]]:
    """Whether a JSON value is a list of texts."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_figures(value: Any, rows: int) -> TypeGuard[list[dict[str, float] | None]]:
    """Whether a JSON value is that many mappings of names to finite numbers, or null each."""
    return (
        isinstance(value, list)
        and len(value) == rows
        and all(row is None or isinstance(row, dict) for row in value)
        and all(type(n) in (int, float) and isfinite(n) for row in value if row is not None for n in row.values())
    )
