"""A hash of all values of weights and buffers: does a state belong to this model?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from keeplora.lora import LoraSlot

from .buffers import model_buffers

__all__ = ["digest", "fingerprint"]

BLOCK = 2**15
"""Words of 32 bits that one sum stands for."""

_hashed: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By tensor in main memory: the plain sum of its words when it was hashed last, and what it gave."""


def fingerprint(model: nn.Module, slots: Sequence[LoraSlot], *, buffers: bool = True, remembered: bool = False) -> str:
    """Of what no task changes: all parameters but the adapted ones, adapters, and what a method put into the model.

    Args:
        buffers: Whether those of the ``state_dict`` count.
        remembered: As of :func:`digest`.
    """
    changing = {id(slot.whole) for slot in slots}
    changing |= {id(p) for slot in slots if slot.adapter is not None for p in slot.adapter.parameters()}
    held = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in changing and "keeplora_head" not in name.split(".")
    }
    return digest((held | model_buffers(model) if buffers else held).items(), remembered=remembered)


@torch.no_grad()
def digest(weights: Iterable[tuple[str, Tensor]], *, remembered: bool = False) -> str:
    r"""Of names, dtypes, shapes and every value of tensors, the same on every device.

    .. math:: h_j = \sum_{i < 2^{15}} m_i\, v_{j, i} \bmod 2^{64}

    of every block j of a tensor's bytes, read as words v of 32 bits, with odd multipliers m; then SHA-256 of all h. A
    single word that differs is always seen, several with a probability of at least :math:`1 - 2^{-32}`.

    Args:
        remembered: Whether a tensor in main memory that was hashed before need not be again while the plain sum of its
            words is the same: three times as fast, and blind to nothing but the same words in another order. For
            hashing what is held on to; not for judging what somebody else made.
    """
    result = hashlib.sha256()
    for name, weight in weights:
        result.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        if not weight.is_meta:
            result.update(_remembered(weight) if remembered and weight.device.type == "cpu" else _sums(weight))
    return result.hexdigest()


def _remembered(weight: Tensor) -> bytes:
    """:func:`_sums`, of a tensor that may have been hashed before."""
    raw = _bytes(weight)
    whole = len(raw) // 8 * 8
    if raw.storage_offset() % 8:
        return _sums(weight)
    plain = (int(raw[:whole].view(torch.int64).sum()), raw[whole:].tolist(), weight.dtype, weight.shape)
    known = _hashed.get(weight)  # type: ignore[no-untyped-call]
    if known is None or known[0] != plain:
        known = _hashed[weight] = plain, _sums(weight)
    sums: bytes = known[1]
    return sums


def _sums(weight: Tensor) -> bytes:
    """The sums of a tensor's blocks, int64."""
    raw = _bytes(weight)
    if len(raw) % 4 or raw.storage_offset() % 4:
        raw = torch.cat([raw, raw.new_zeros(-len(raw) % 4)])
    words = raw.view(torch.int32)
    whole = len(words) // BLOCK * BLOCK
    blocks, factors = words[:whole].view(-1, BLOCK), _factors(raw.device)
    portions = torch.split(blocks, torch.get_num_threads() if raw.device.type == "cpu" else 512)  # as caches hold
    sums = [(portion * factors).sum(1) for portion in portions]
    sums.append((words[whole:] * factors[: len(words) - whole]).sum().view(1))
    return torch.cat(sums).cpu().numpy().tobytes()


def _bytes(weight: Tensor) -> Tensor:
    if type(weight).__module__.startswith("torchao."):
        weight = weight.dequantize()
    return weight.detach().contiguous().reshape(-1).view(torch.uint8)


@lru_cache(maxsize=16)
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**62), 2**62, (BLOCK,), generator=generator, device="cpu")
    return (2 * drawn + 1).to(device)
