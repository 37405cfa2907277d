"""sketch_rows: a random row sketch of a layer's gradient, without the gradient itself."""

from typing import Any

import torch
from torch import Tensor

from keeplora.ops.check import matrix, wide
from keeplora.ops.declare import declare

__all__ = ["random_signs", "sketch_rows"]

_MASK = 0xFFFFFFFF


def sketch_rows(x: Tensor, delta: Tensor, *, width: int, seed: int, out: Tensor | None = None) -> Tensor:
    r"""Accumulate ``Ψ`` times the weight gradient ``δᵀ x`` of a linear layer.

    $$ Z \leftarrow Z + \Psi\,\delta^T x, \qquad \Psi_{ij} = \pm 1/\sqrt{\mathrm{width}} $$

    ``Ψ`` is never stored: its signs are those of [`random_signs`][], the same on every device and rank, so
    sketches of several batches or processes made with one seed may be added. ``E[ZᵀZ] = GᵀG``: the top right
    singular vectors of ``Z`` approximate those of the gradient.

    Args:
        x: ``[tokens, d_in]``, the layer's input, any floating dtype.
        delta: ``[tokens, d_out]``, gradient of the layer's output, any floating dtype.
        width: rows of the sketch, at least 1.
        seed: names ``Ψ``; ``0 <= seed < 2**63``.
        out: ``Z [width, d_in]`` to add to, contiguous, float32 (float64 if an input is float64);
            zeros when ``None``.

    Returns:
        ``Z``: the tensor given as ``out``, or a new one. Computed in its dtype, but where both inputs are
        bfloat16 on a GPU: there ``Ψ δᵀ`` is rounded to bfloat16, 3e-3 of ``Z`` in the norm if the terms of the
        tokens do not cancel.

    Raises:
        ValueError: shapes do not fit, ``width < 1``, or ``seed`` is out of range.
        TypeError: an input is not floating, or ``out`` has the wrong dtype.

    Not differentiable: a statistic. Its inputs count as constants.

    Source: sign sketches of Achlioptas, "Database-friendly random projections", 2003; randomized range
    finding of Halko, Martinsson & Tropp, 2011, arXiv:0909.4061.

    Examples:
        >>> x, delta = torch.randn(10, 4), torch.randn(10, 6)
        >>> z = sketch_rows(x, delta, width=3, seed=7)
        >>> psi = random_signs(3, 6, seed=7) / 3**0.5
        >>> torch.allclose(z, psi @ delta.T @ x, atol=1e-5)
        True
    """
    matrix("sketch_rows", "x", x)
    matrix("sketch_rows", "delta", delta)
    if x.shape[0] != delta.shape[0] or x.device != delta.device:
        raise ValueError(
            f"sketch_rows: delta must have the tokens and the device of x, got {list(delta.shape)} on "
            f"{delta.device} for x {list(x.shape)} on {x.device}."
        )
    _check_signs("sketch_rows", width, seed)
    shape, acc = (width, x.shape[1]), wide(x.dtype, delta.dtype)
    out = x.new_zeros(shape, dtype=acc) if out is None else out
    matrix("sketch_rows", "out", out, (acc,))
    if out.shape != shape or not out.is_contiguous() or out.device != x.device:
        raise ValueError(
            f"sketch_rows: out must be contiguous {list(shape)} on {x.device}, got shape {list(out.shape)} "
            f"with strides {list(out.stride())} on {out.device}."
        )
    _op.call(out.detach(), x.detach(), delta.detach(), seed)
    return out


def random_signs(
    rows: int, cols: int, *, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """The ``[rows, cols]`` matrix of signs ±1 that ``seed`` names, equal on every device.

    Bit ``j % 32`` of a 32-bit hash of ``(seed, i, j // 32)`` decides entry ``(i, j)``: 0 gives +1. A larger
    matrix of the same seed contains a smaller one as its upper left corner.

    Raises:
        ValueError: ``rows < 1`` or ``seed`` is outside ``[0, 2**63)``.

    Source: the 32-bit finalizer of MurmurHash3 (Appleby, 2011), chained over seed, row and word.

    Examples:
        >>> random_signs(2, 5, seed=1).abs().sum().item()
        10.0
    """
    _check_signs("random_signs", rows, seed)
    return _signs(rows, 0, cols, seed, device, dtype).contiguous()


def _signs(rows: int, first: int, last: int, seed: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Columns ``first … last − 1``; ``first`` is a multiple of 32."""
    i = torch.arange(rows, device=device)[:, None]
    word = torch.arange(first // 32, (last + 31) // 32, device=device)[None, :]
    state = _mix(_mix(torch.full_like(i, seed & _MASK)) ^ (seed >> 32))
    bits = _mix(_mix(state ^ i) ^ word)
    unpacked = (bits[:, :, None] >> torch.arange(32, device=device)).bitwise_and_(1).mul_(-2).add_(1)
    return unpacked.reshape(rows, -1)[:, : last - first].to(dtype)


def _mix(h: Tensor) -> Tensor:
    # fmix32 on values held in int64: products wrap modulo 2**64, so their low 32 bits are right.
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def _check_signs(op: str, width: int, seed: int) -> None:
    if width < 1:
        raise ValueError(f"{op}: {'width' if op == 'sketch_rows' else 'rows'} must be at least 1, got {width}.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed must be in [0, 2**63), got {seed}.")


_CHUNK = 512  # of Ψ at a time: all of it would take more memory than the sketch


def _reference(out: Tensor, x: Tensor, delta: Tensor, seed: int) -> None:
    width, cols = out.shape[0], delta.shape[1]
    mixed = out.new_zeros(width, len(x))
    for first in range(0, cols, _CHUNK):
        last = min(cols, first + _CHUNK)
        psi = _signs(width, first, last, seed, x.device, out.dtype)
        mixed.addmm_(psi, delta[:, first:last].to(out.dtype).T)
    out.addmm_(mixed, x.to(out.dtype), alpha=width**-0.5)


def _fake(out: Tensor, x: Tensor, delta: Tensor, seed: int) -> None:
    return None


def _samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def start(width: int, d: int) -> Tensor:
        return torch.randn(width, d, device=device, dtype=wide(dtype))

    return [
        (start(3, 5), make(7, 5), make(7, 40), 0),
        (start(1, 1), make(2, 1), make(2, 1), 2**62 + 5),
        (start(4, 6), make(0, 6), make(0, 9), 3),
    ]


_op = declare(
    "sketch_rows(Tensor(a!) out, Tensor x, Tensor delta, int seed) -> ()",
    reference=_reference,
    fake=_fake,
    samples=_samples,
)
