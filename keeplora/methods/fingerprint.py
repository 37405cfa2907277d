"""A short hash of weights: does a state belong to this model?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from keeplora.lora import LoraSlot

__all__ = ["digest", "fingerprint"]


def fingerprint(model: nn.Module, slots: Sequence[LoraSlot]) -> str:
    """Of the weights that no task changes: all but the adapted ones, adapters, and what a method put into the model."""
    changing = {id(slot.whole) for slot in slots}
    changing |= {id(p) for slot in slots if slot.adapter is not None for p in slot.adapter.parameters()}
    return digest(
        (f"{name} {list(parameter.shape)}", parameter)
        for name, parameter in model.named_parameters()
        if id(parameter) not in changing and "keeplora_head" not in name.split(".")
    )


def digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Of descriptions and up to 64 values of each weight."""
    result = hashlib.sha256()
    for description, weight in weights:
        values = weight.detach().flatten()
        values = values[:: max(1, values.numel() // 64)][:64].double().cpu()
        result.update(f"{description} {values.tolist()}".encode())
    return result.hexdigest()
