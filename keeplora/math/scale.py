"""Matrices of any size: their squares must neither overflow nor vanish, so they are scaled by powers of two."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from keeplora.math.check import finite

__all__ = ["largest", "powers", "scaled"]

# From 2^-ORDINARY to 2^ORDINARY a largest entry is left as it is: also fourth powers of norms are numbers of float32.
ORDINARY = 28
MOST = {torch.float32: 126, torch.float64: 1022}  # exponents: their negatives are those of normal numbers, too


def powers(name: str, argument: str, values: Sequence[Tensor]) -> list[float]:
    """For every matrix the power of four that brings its largest entry near 1; 1 where that is of ordinary size.

    The product with it rounds nothing. One transfer to the host for all.

    Raises:
        ValueError: a value is NaN or infinite.

    Examples:
        >>> powers("f", "x", [torch.ones(2, 2), torch.full((1, 1), 2.0**39)]) == [1.0, 4.0**-20]
        True
    """
    sizes = largest(values)
    if not all(map(math.isfinite, sizes)):
        finite(name, argument, values)
    return [_power(size, MOST.get(value.dtype, MOST[torch.float32])) for size, value in zip(sizes, values, strict=True)]


def scaled(value: Tensor, power: float) -> Tensor:
    """The product, or the value itself where the power is 1."""
    return value if power == 1 else value * power


def _power(size: float, most: int) -> float:
    exponent = math.frexp(size)[1]  # 0 of 0
    return 1.0 if abs(exponent) <= ORDINARY else 4.0 ** -(max(-most, min(most, exponent)) // 2)


def largest(values: Sequence[Tensor]) -> list[float]:
    """The size of every matrix's largest entry; NaN where one is. One transfer to the host for all.

    Examples:
        >>> largest([torch.tensor([[1.0, -3.0]]), torch.zeros(0, 2)])
        [3.0, 0.0]
    """
    if not values:
        return []
    extremes = [torch.stack(torch.aminmax(v.detach())) if v.numel() else v.new_zeros(2) for v in values]
    device = values[0].device  # they may lie on several
    sizes: list[float] = torch.stack([pair.double().abs().amax().to(device) for pair in extremes]).tolist()
    return sizes
