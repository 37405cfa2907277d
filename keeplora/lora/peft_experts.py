"""Experts as PEFT's ``target_parameters`` has them: the factors of all in one A and one B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .experts import LoraExperts
from .peft_checkpoint import ExpertWeight
from .slot import LoraSlot
from .update import Update

__all__ = ["expert_weights"]


def expert_weights(slots: Sequence[LoraSlot], updates: Mapping[str, Update]) -> list[ExpertWeight]:
    """The updates of experts, by weight; those without any are left out.

    All get one rank, the largest: PEFT takes patterns of ranks for parameters, and warns that it does not.
    """
    rank = max((updates[slot.name].rank for slot in slots), default=0)
    members: dict[str, dict[str, list[LoraSlot]]] = {}
    for slot in slots:
        members.setdefault(slot.target.module, {}).setdefault(slot.parameter, []).append(slot)
    found = []
    for path, weights in members.items():
        for depth, name in enumerate(_inwards(weights, updates)):
            a, b = _factors(weights[name], updates, rank)
            found.append(ExpertWeight(f"{path}.{name}", path + ".base_layer" * depth, rank, a, b))
    return found


def _inwards(weights: Mapping[str, Sequence[LoraSlot]], updates: Mapping[str, Update]) -> list[str]:
    """The weights of a module that have an update: PEFT wraps one after the other, so the last is outermost."""
    [host] = {mine[0].host for mine in weights.values()}
    moved = {name for name, mine in weights.items() if any(updates[slot.name].rank for slot in mine)}
    return [name for name, _ in host.named_parameters(recurse=False) if name in moved][::-1]


def _factors(slots: Sequence[LoraSlot], updates: Mapping[str, Update], rank: int) -> tuple[Tensor, Tensor]:
    """A and B of all experts; zeros where an expert has none, or of a smaller rank."""
    host, dtype = slots[0].host, slots[0].exact_dtype
    assert isinstance(host, LoraExperts)
    out, width = slots[0].weight.shape
    a, b = torch.zeros(host.experts, rank, width, dtype=dtype), torch.zeros(host.experts, out, rank, dtype=dtype)
    for slot in slots:
        update, expert = updates[slot.name].of_rank(rank), slot.target.expert
        assert expert is not None
        a[expert], b[expert] = update.a, update.b
    if host.layout.transposed and not getattr(host, "is_transposed", False):
        a, b = b.transpose(1, 2), a.transpose(1, 2)  # PEFT takes it for [experts, out, in]
    return a.reshape(-1, a.shape[2]), b.permute(1, 2, 0).reshape(b.shape[1], -1)
