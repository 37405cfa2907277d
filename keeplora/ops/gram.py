"""gram: second moment of a layer's inputs, accumulated over batches."""

from typing import Any

import torch
from torch import Tensor

from keeplora.ops.check import matrix, wide
from keeplora.ops.declare import declare

__all__ = ["gram"]


def gram(x: Tensor, *, out: Tensor | None = None, energy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Accumulate the uncentred second moment of the rows of ``x`` and their total energy.

    .. math:: C \leftarrow C + x^T x, \qquad e \leftarrow e + \sum_t \lVert x_t \rVert^2

    Args:
        x: ``[tokens, d]``, any floating dtype; ``tokens`` may be 0.
        out: ``C [d, d]`` to add to, contiguous, float32 (float64 for float64 ``x``); zeros when ``None``.
        energy: ``e []`` to add to, float64; zero when ``None``.

    Returns:
        ``(out, energy)``: the tensors given, or new ones. Products are summed in float32 (float64 for float64
        ``x``); ``e`` is summed over rows in float64. A 16-bit ``x`` is not widened as a whole: on a GPU tensor
        cores multiply it as it is (``torch.addmm`` with ``out_dtype=torch.float32``), elsewhere 2048 rows are
        widened at a time.

    Raises:
        ValueError: shapes do not fit.
        TypeError: ``x`` is not floating, or an accumulator has the wrong dtype.

    Not differentiable: a statistic. ``x`` counts as a constant.

    Source: the feature second moment of KeepLoRA, ICLR 2026, arXiv:2601.19659.

    Example:
        >>> c, energy = gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        >>> c, energy
        (tensor([[1., 2.],
                [2., 5.]]), tensor(6., dtype=torch.float64))
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
            energies = torch.linalg.vector_norm(rows, dim=1, dtype=out.dtype).double().square()
        else:
            rows = rows.to(out.dtype)
            out.addmm_(rows.T, rows)
            energies = torch.linalg.vecdot(rows, rows)
        energy += energies.sum(dtype=torch.float64)


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
