"""A hash of all values of tensors, in blocks; what was hashed before is remembered."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["digest", "digest_of_sums", "sums", "sums_of_rows"]

BLOCK = 2**15
"""Words of 32 bits that one sum stands for."""

_hashed: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By tensor in main memory: the plain sum of its words when it was hashed last, and what it gave."""


@torch.no_grad()
def digest(weights: Iterable[tuple[str, Tensor]], *, remembered: bool = False) -> str:
    r"""Of names, dtypes, shapes and every value of tensors, the same on every device.

    $$ h_j = \sum_{i < 2^{15}} m_i\, v_{j, i} \bmod 2^{64} $$

    of every block j of a tensor's bytes, read as words v of 32 bits, with odd multipliers m; then SHA-256 of all h. A
    single word that differs is always seen, several with a probability of at least $1 - 2^{-32}$.

    Args:
        remembered: Whether a tensor in main memory that was hashed before need not be again while the plain sum of its
            words is the same, and torch's counter of what was written to it: three times as fast, and blind to nothing
            but the same words in another order, put there past the counter, through ``.data``. For hashing what is held
            on to; not for judging what somebody else made.
    """
    return digest_of_sums(
        (name, weight.dtype, weight.shape, b"" if weight.is_meta else sums(weight, remembered=remembered))
        for name, weight in weights
    )


def digest_of_sums(entries: Iterable[tuple[str, torch.dtype, Sequence[int], bytes]]) -> str:
    """``digest`` of tensors by names, dtypes, shapes and ``sums``."""
    result = hashlib.sha256()
    for name, dtype, shape, blocks in entries:
        result.update(f"{name} {dtype} {list(shape)}\n".encode())
        result.update(blocks)
    return result.hexdigest()


def _remembered(weight: Tensor) -> bytes:
    """``_sums``, of a tensor that may have been hashed before."""
    raw = _bytes(weight)
    whole = len(raw) // 8 * 8
    if raw.storage_offset() % 8:
        return _sums(weight)
    written = None if weight.is_inference() else weight._version
    plain = (int(raw[:whole].view(torch.int64).sum()), raw[whole:].tolist(), weight.dtype, weight.shape, written)
    known = _hashed.get(weight)  # type: ignore[no-untyped-call]
    if known is None or known[0] != plain:
        known = _hashed[weight] = plain, _sums(weight)
    blocks: bytes = known[1]
    return blocks


@torch.no_grad()
def sums(weight: Tensor, *, remembered: bool = False) -> bytes:
    """Of one tensor the sums of its blocks, int64; ``remembered`` as of ``digest``."""
    return _remembered(weight) if remembered and weight.device.type == "cpu" else _sums(weight)


@torch.no_grad()
def sums_of_rows(rows: Tensor, first: int, shape: Sequence[int]) -> Tensor:
    """What rows of a tensor, from ``first`` on, give to the sums of it: those of all rows add up to ``sums``.

    Shapes: rows ``[n, …]`` of a tensor of ``shape`` → int64, one number for each block of the tensor.
    """
    row = math.prod(shape[1:]) * rows.element_size()
    total = torch.zeros(-(-shape[0] * row // 4) // BLOCK + 1, dtype=torch.int64, device=rows.device)
    if rows.numel():
        block, lead = divmod(first * row, 4 * BLOCK)
        raw = _bytes(rows)
        found = _sums_of_bytes(torch.cat([raw.new_zeros(lead), raw]))
        total[block : block + len(found)] += found
    return total


def _sums(weight: Tensor) -> bytes:
    return _sums_of_bytes(_bytes(weight)).cpu().numpy().tobytes()


def _sums_of_bytes(raw: Tensor) -> Tensor:
    if len(raw) % 4 or raw.storage_offset() % 4:
        raw = torch.cat([raw, raw.new_zeros(-len(raw) % 4)])
    words = raw.view(torch.int32)
    whole = len(words) // BLOCK * BLOCK
    blocks, factors = words[:whole].view(-1, BLOCK), _factors(raw.device)
    portions = torch.split(blocks, torch.get_num_threads() if raw.device.type == "cpu" else 512)  # as caches hold
    found = [(portion * factors).sum(1) for portion in portions]
    found.append((words[whole:] * factors[: len(words) - whole]).sum().view(1))
    return torch.cat(found)


def _bytes(weight: Tensor) -> Tensor:
    if type(weight).__module__.startswith("torchao."):
        weight = weight.dequantize()
    return weight.detach().contiguous().reshape(-1).view(torch.uint8)


@lru_cache(maxsize=16)
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**62), 2**62, (BLOCK,), generator=generator, device="cpu")
    return (2 * drawn + 1).to(device)
