"""A hash of all values of weights and buffers: does a state belong to this model?"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from keeplora.lora import LoraSlot
from keeplora.math.digest import digest

from .buffers import model_buffers

__all__ = ["fingerprint"]


def fingerprint(model: nn.Module, slots: Sequence[LoraSlot], *, buffers: bool = True, remembered: bool = False) -> str:
    """Of what no task changes: all parameters but the adapted ones, adapters, and what a method put into the model.

    Args:
        buffers: Whether those of the ``state_dict`` count.
        remembered: As of ``digest``.
    """
    changing = {id(slot.whole) for slot in slots}
    changing |= {id(p) for slot in slots if slot.adapter is not None for p in slot.adapter.parameters()}
    held = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in changing and "keeplora_head" not in name.split(".")
    }
    return digest((held | model_buffers(model) if buffers else held).items(), remembered=remembered)
