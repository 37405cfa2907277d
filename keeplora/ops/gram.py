"""gram: second moment of a layer's inputs, accumulated over batches."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from keeplora.ops.check import matrix, wide
from keeplora.ops.declare import declare

__all__ = ["energy_of", "gram", "quick_energy"]


def gram(x: Tensor, *, out: Tensor | None = None, energy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Accumulate the uncentred second moment of the rows of ``x`` and their total energy.

    $$ C \leftarrow C + x^T x, \qquad e \leftarrow e + \sum_t \lVert x_t \rVert^2 $$

    Args:
        x: ``[tokens, d]``, any floating dtype; ``tokens`` may be 0.
        out: ``C [d, d]`` to add to, contiguous, float32 (float64 for float64 ``x``); zeros when ``None``.
        energy: ``e []`` to add to, float64; zero when ``None``.

    Returns:
        ``(out, energy)``: the tensors given, or new ones. Products are summed in float32 (float64 for float64
        ``x``); ``e`` is summed over rows in float64. A 16-bit ``x`` is not widened as a whole: on a GPU tensor
        cores multiply it as it is (``torch.addmm`` with ``out_dtype=torch.float32``), elsewhere 2048 rows are
        widened at a time.

        Numbers below 1e-19 or above 1e19 have squares that float32 does not hold: in ``C`` they vanish or are
        infinite. ``e`` is right then on a CPU, and as ``energy_of`` gives it elsewhere. Where ``tr C`` is not
        ``e``, multiply ``x`` by a power of two, or pass it in float64.

    Raises:
        ValueError: shapes do not fit.
        TypeError: ``x`` is not floating, or an accumulator has the wrong dtype.

    Not differentiable: a statistic. ``x`` counts as a constant.

    Source: the feature second moment of KeepLoRA, ICLR 2026, arXiv:2601.19659.

    Examples:
        >>> c, energy = gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        >>> c, energy
        (tensor([[1., 2.],
                [2., 5.]]), tensor(6., dtype=torch.float64))
        >>> c, energy = gram(torch.full((1, 1), 2.0**-100))
        >>> c, energy == 2.0**-200
        (tensor([[0.]]), tensor(True))
    """
    matrix("gram", "x", x)
    d, acc = x.shape[1], wide(x.dtype)
    out = x.new_zeros(d, d, dtype=acc) if out is None else out
    energy = x.new_zeros((), dtype=torch.float64) if energy is None else energy
    matrix("gram", "out", out, (acc,))
    if out.shape != (d, d) or not out.is_contiguous() or out.device != x.device:
        raise ValueError(
            f"gram: out must be contiguous [{d}, {d}] on {x.device}, got shape {list(out.shape)} with "
            f"strides {list(out.stride())} on {out.device}."
        )
    if energy.dtype != torch.float64:
        raise TypeError(f"gram: energy must be float64, got {energy.dtype}.")
    if energy.dim() != 0 or energy.device != x.device:
        raise ValueError(
            f"gram: energy must be a scalar on {x.device}, got shape {list(energy.shape)} on {energy.device}."
        )
    _op.call(out.detach(), energy.detach(), x.detach())
    return out, energy


# Of a 16-bit x at a time. Tensor cores cut sums off where float32 arithmetic rounds: a sum of squares loses up to
# 2**-24 of itself per step of 16 rows, 4e-6 over this many, and the sum over the parts is rounded again.
_ROWS = 2048


def _reference(out: Tensor, energy: Tensor, x: Tensor) -> None:
    short = x.dtype in (torch.float16, torch.bfloat16)
    for rows in torch.split(x, _ROWS) if short else (x,):
        if short and x.is_cuda:
            torch.addmm(out, rows.T, rows, out_dtype=torch.float32, out=out)
        else:
            rows = rows.to(out.dtype)
            _add_moment(out, rows)
        energy += quick_energy(rows)


_BLOCKS, _TOKENS, _WIDTH = 8, 192, 512
"""On a CPU: of columns, and from which sizes on they pay."""


def _add_moment(out: Tensor, rows: Tensor) -> None:
    """``C += xᵀx``; on a CPU blocks on and above the diagonal are multiplied, and added on both sides."""
    tokens, d = rows.shape
    if rows.device.type != "cpu" or tokens < _TOKENS or d < _WIDTH:
        out.addmm_(rows.T, rows)
        return
    for first, last in pairwise(d * i // _BLOCKS for i in range(_BLOCKS + 1)):
        block = rows[:, first:last].T @ rows[:, first:]
        out[first:last, first:] += block
        out[last:, first:last] += block[:, last - first :].T


# The mean square, from here to its inverse: float32 loses no square that counts.
_ORDINARY = 2.0**-100


def quick_energy(rows: Tensor) -> Tensor:
    """``energy_of(rows)`` from squares in their dtype, float32 for 16-bit ones; looked at on a CPU, where that does not
    make anything wait."""
    if rows.dtype in (torch.float16, torch.bfloat16):
        lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        return lengths.double().square().sum()
    energy: Tensor = torch.linalg.vecdot(rows, rows).sum(dtype=torch.float64)
    if rows.device.type == "cpu" and rows.dtype == torch.float32:
        mean = float(energy) / max(1, rows.numel())
        return energy if _ORDINARY <= mean <= 1 / _ORDINARY else energy_of(rows)
    return energy


def energy_of(rows: Tensor) -> Tensor:
    r"""``Σ ‖x_t‖²`` of ``rows [tokens, d]``, squares and sums in float64: right whatever the size of float32 numbers.

    Examples:
        >>> energy_of(torch.full((2, 2), 2.0**-100)) == 4 * 2.0**-200
        tensor(True)
    """
    parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in torch.split(rows, _ROWS)]
    return torch.stack(parts).square().sum()


def _fake(out: Tensor, energy: Tensor, x: Tensor) -> None:
    return None


def _samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def sample(tokens: int, d: int) -> tuple[Any, ...]:
        out = torch.randn(d, d, device=device, dtype=wide(dtype))
        return (
            out,
            torch.ones((), device=device, dtype=torch.float64),
            torch.randn(tokens, d, device=device, dtype=dtype),
        )

    return [sample(7, 5), sample(0, 3), sample(33, 1)]


_op = declare(
    "gram(Tensor(a!) out, Tensor(b!) energy, Tensor x) -> ()",
    reference=_reference,
    fake=_fake,
    samples=_samples,
)
