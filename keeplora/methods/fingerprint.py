"""A hash of all values of weights and buffers: does a state belong to this model?"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from keeplora.lora import LoraSlot
from keeplora.lora.quantised import biases_that_are_cast
from keeplora.lora.shares import is_dtensor, rows_of
from keeplora.math.digest import digest, digest_of_sums, sums

from .buffers import model_buffers
from .shared_sums import sums_everywhere

__all__ = ["fingerprint"]


def fingerprint(model: nn.Module, slots: Sequence[LoraSlot], *, buffers: bool = True, remembered: bool = False) -> str:
    """Of what no task changes: all parameters but the adapted ones, adapters, and what a method put into the model.

    Args:
        buffers: Whether those of the ``state_dict`` count.
        remembered: As of ``digest``.
    """
    changing = {id(slot.stored) for slot in slots}
    changing |= {id(p) for slot in slots if slot.adapter is not None for p in slot.adapter.parameters()}
    held: dict[str, Tensor] = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in changing and "keeplora_head" not in name.split(".")
    }
    cast = {id(bias) for bias in biases_that_are_cast(model)}
    held = {name: p.bfloat16() if id(p) in cast else p for name, p in held.items()}
    if any(map(is_dtensor, held.values())):
        return _of_shares(held, model_buffers(model) if buffers else {})
    return digest((held | model_buffers(model) if buffers else held).items(), remembered=remembered)


def _of_shares(held: dict[str, Tensor], buffers: dict[str, Tensor]) -> str:
    """The same where parameters lie in several processes."""
    shared = {name: p for name, p in held.items() if is_dtensor(p)}
    found = dict(zip(shared, sums_everywhere([(rows_of(p), p.shape) for p in shared.values()]), strict=True))
    every = {**held, **buffers}
    return digest_of_sums((n, t.dtype, t.shape, found[n] if n in found else sums(t)) for n, t in every.items())
