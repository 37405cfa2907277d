"""Argument checks shared by this room, on top of those of the ops. Each raises before anything is
computed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from keeplora.ops.check import MASTER, matrices, orthonormal, repeated, same_length

__all__ = ["bases", "finite", "fractions", "orthonormal", "ranks", "second_moments"]


def bases(name: str, first: str, like: Sequence[Tensor], q: Sequence[Tensor]) -> list[Tensor]:
    """Return ``q`` as a list of ``[in, k]`` with ``k <= in`` that fit the columns of ``like``, or raise."""
    checked = matrices(name, "q", q, MASTER)
    same_length(name, **{first: like, "q": checked})
    for i, (matrix, basis) in enumerate(zip(like, checked, strict=True)):
        if basis.shape[0] != matrix.shape[1]:
            raise ValueError(
                f"{name}: q[{i}] must have as many rows as {first}[{i}] has columns, got shape "
                f"{list(basis.shape)} for {list(matrix.shape)}. Protect the input side of the layer."
            )
        if basis.shape[1] > basis.shape[0]:
            raise ValueError(
                f"{name}: q[{i}] must have at most as many columns as rows, got shape {list(basis.shape)}. "
                f"A space of {basis.shape[0]} dimensions holds no more orthonormal directions."
            )
        if basis.dtype != matrix.dtype or basis.device != matrix.device:
            raise TypeError(
                f"{name}: q[{i}] must have the dtype and device of {first}[{i}], got {basis.dtype} on "
                f"{basis.device} for {matrix.dtype} on {matrix.device}."
            )
    return checked


def finite(name: str, argument: str, values: Sequence[Tensor]) -> None:
    """Raise unless no value is NaN or infinite; one transfer to the host for all of them."""
    if not values:
        return
    sums = torch.stack([v.sum() for v in values])  # NaN and Inf survive a sum; one that overflows is looked at below
    for i, ok in enumerate(sums.isfinite().tolist()):
        if not ok and not bool(values[i].isfinite().all()):
            bad = (~values[i].isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"{name}: {argument}[{i}] must be finite, got {values[i][tuple(bad)].item()} at {bad}. "
                f"Look for an overflow in the pass that filled it."
            )


def fractions(name: str, argument: str, value: float | Sequence[float], count: int) -> list[float]:
    """One number in [0, 1] per layer; a single number is repeated."""
    numbers = repeated(name, argument, value, count, "layer")
    for i, number in enumerate(numbers):
        if not 0.0 <= number <= 1.0:
            raise ValueError(
                f"{name}: {argument} must lie in [0, 1], got {number} at {i}. Give a fraction of the energy."
            )
    return numbers


def ranks(name: str, value: int | Sequence[int], sizes: Sequence[int]) -> list[int]:
    """One rank in ``1 … size`` per layer; a single number is repeated."""
    if not isinstance(value, int | Sequence) or isinstance(value, bool | str):
        raise TypeError(f"{name}: rank must be an int or one int per layer, got {value!r}.")
    numbers = [value] * len(sizes) if isinstance(value, int) else list(value)
    if len(numbers) != len(sizes):
        raise ValueError(
            f"{name}: rank must be one number or one per layer, got {len(numbers)} for {len(sizes)} layers."
        )
    for i, (number, size) in enumerate(zip(numbers, sizes, strict=True)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name}: rank must be an int, got {number!r} at {i}.")
        if not 1 <= number <= size:
            raise ValueError(f"{name}: rank must lie in 1 … {size} (the layer's inputs), got {number} at {i}.")
    return numbers


def second_moments(name: str, c: Sequence[Tensor]) -> None:
    """Raise unless every ``c[i]`` could be ``xᵀx``: symmetric, its largest entry on the diagonal."""
    if not c:
        return
    zero = c[0].new_zeros(())

    def largest(m: Tensor) -> Tensor:
        return torch.stack(torch.aminmax(m)).abs().amax()  # no copy of the matrix

    extremes = [
        torch.stack([(m - m.T).abs_().amax(), largest(m), m.diagonal().amax(), m.diagonal().amin()])
        if m.numel()
        else torch.stack([zero] * 4)
        for m in c
    ]
    loose = torch.finfo(c[0].dtype).eps ** 0.5
    for i, (skew, largest, top, bottom) in enumerate(torch.stack(extremes).tolist()):
        if skew > loose * largest:
            raise ValueError(f"{name}: c[{i}] must be symmetric, got max|C - Cᵀ| = {skew:.2e}. Pass (C + Cᵀ) / 2.")
        if bottom < -loose * largest or largest > (1 + loose) * max(top, 0.0):
            raise ValueError(
                f"{name}: c[{i}] must be positive semidefinite, got an entry of size {largest:.2e} and "
                f"a diagonal from {bottom:.2e} to {top:.2e}. Pass the second moment xᵀx."
            )
