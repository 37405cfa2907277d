"""The adapters a task starts with, what is kept of them, and what is said where they are smaller than asked for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from keeplora.lora import LoraAdapter, LoraSlot, Target
from keeplora.math.lowrank import TopDirections
from keeplora.methods.method import freeze

from .config import KeepLoraConfig

__all__ = ["Protected", "adapter_tensors", "attach", "check_ranks", "new_adapter", "restore", "warn_of_small_ranks"]

_NAMED = 3  # layers, in a warning


@dataclass
class Protected:
    """What is remembered of one slot between tasks."""

    basis: Tensor
    added: tuple[int, ...] = ()  # by task


def check_ranks(model: nn.Module, targets: Sequence[Target], r: int, *, method: str = "KeepLora") -> None:
    """Refuse a rank that is larger than a layer's width."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target in targets:
        weight = parameters.get(f"{target.module}.{target.parameter}".lstrip("."))
        width = r if weight is None else weight.shape[1]  # wrap says what is wrong with a missing one
        if r > width:
            raise ValueError(
                f"{method}: r must be at most the layer's width, got {r} for {width} [{target.name}]. Lower r."
            )


def new_adapter(slot: LoraSlot, found: TopDirections, scaling: float, config: KeepLoraConfig) -> LoraAdapter | None:
    """An adapter along the directions that were found; None where there are none."""
    if found.a.shape[0] == 0:
        return None
    if config.init_b == "zero":
        b = torch.zeros(slot.weight.shape[0], found.a.shape[0], dtype=found.a.dtype, device=found.a.device)
        return LoraAdapter(found.a, b, scaling, train_a=config.train_a, dropout=config.dropout)
    b = found.b * found.s
    return LoraAdapter(found.a, b, scaling, train_a=config.train_a, dropout=config.dropout, origin=b)


def attach(model: nn.Module, slots: Sequence[LoraSlot], adapters: Sequence[LoraAdapter | None]) -> None:
    """Freeze the model and put an adapter into every slot that gets one."""
    freeze(model)
    for slot, adapter in zip(slots, adapters, strict=True):
        if adapter is not None:
            slot.attach(adapter)


def adapter_tensors(slot: LoraSlot) -> dict[str, Tensor]:
    """What a state holds of the slot's open adapter, and of those that were merged."""
    tensors: dict[str, Tensor | None] = {}
    if slot.adapter is not None:
        tensors |= {"A": slot.adapter.A, "B": slot.adapter.B, "origin": slot.adapter.origin}
    learned = slot.host.learned.get(slot.slot, [])
    if learned is not None:
        out, width = slot.weight.shape
        tensors["learned.A"] = torch.cat([a for a, _ in learned]) if learned else torch.zeros(0, width)
        tensors["learned.B"] = torch.cat([b for _, b in learned], dim=1) if learned else torch.zeros(out, 0)
    return {f"{slot.name}.{key}": tensor for key, tensor in tensors.items() if tensor is not None}


def restore(slot: LoraSlot, tensors: Mapping[str, Tensor], scaling: float, config: KeepLoraConfig) -> None:
    """Bring the slot back to what :func:`adapter_tensors` was given."""
    slot.detach()
    a, b = (tensors.get(f"{slot.name}.learned.{key}") for key in "AB")
    slot.host.learned[slot.slot] = None if a is None or b is None else [(a, b)] if len(a) else []
    if f"{slot.name}.A" in tensors:
        a, b = (tensors[f"{slot.name}.{key}"] for key in "AB")
        origin = tensors.get(f"{slot.name}.origin")
        slot.attach(LoraAdapter(a, b, scaling, train_a=config.train_a, dropout=config.dropout, origin=origin))


def warn_of_small_ranks(
    slots: Sequence[LoraSlot],
    bases: Sequence[Tensor],
    directions: Sequence[TopDirections],
    r: int,
    *,
    stacklevel: int = 3,
) -> None:
    """Name the layers whose adapters are smaller than r, or missing; as a warning of the caller's caller."""
    full = [s.name for s, q in zip(slots, bases, strict=True) if q.shape[0] == q.shape[1]]
    flat = [s.name for s, d in zip(slots, directions, strict=True) if d.a.shape[0] == 0 and s.name not in full]
    small = [s.name for s, d in zip(slots, directions, strict=True) if 0 < d.a.shape[0] < r]
    for names, what in (
        (full, "have no free direction left and do not adapt"),
        (flat, "have no gradient in free space and do not adapt"),
        (small, f"have fewer than r = {r} useful free directions and use those"),
    ):
        if names:
            shown = ", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else "")
            warnings.warn(
                f"KeepLora: {len(names)} of {len(slots)} layers {what}: {shown}. "
                "Lower weight_energy or feature_energy for more room.",
                UserWarning,
                stacklevel=stacklevel,
            )
