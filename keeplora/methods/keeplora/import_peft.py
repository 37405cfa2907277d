"""A stock PEFT checkpoint as adapters that keep out of what is protected."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from keeplora.lora import LoraSlot, peft_checkpoint
from keeplora.lora.peft_checkpoint import Update
from keeplora.ops.project_rows import project_rows

from .trained_a import LEAK, leak_of_rows

__all__ = ["imported_adapters"]


@torch.no_grad()
def imported_adapters(
    path: str | os.PathLike[str],
    slots: Sequence[LoraSlot],
    bases: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    project: bool,
) -> list[dict[str, Tensor] | None]:
    """A and B of every slot that the checkpoint adapts, with the slot's scaling; see :meth:`KeepLora.import_peft`."""
    updates = peft_checkpoint.split(slots, peft_checkpoint.read(path))
    if not updates:
        raise ValueError(f"import_peft: {os.fspath(path)} must hold an update of the targets, got B = 0 everywhere")
    return [
        _confined(slot, updates[slot.name], q, scaling, project=project) if slot.name in updates else None
        for slot, q, scaling in zip(slots, bases, scalings, strict=True)
    ]


def _confined(slot: LoraSlot, update: Update, q: Tensor, scaling: float, *, project: bool) -> dict[str, Tensor]:
    a, b = update.a.to(q), update.b.to(q)
    if scaling == 0:
        raise ValueError(f"import_peft: depth_scale must not be 0 where the adapter has an update [{slot.name}]")
    leak = leak_of_rows(a, q)
    if leak > LEAK and not project:
        raise ValueError(
            f"import_peft: the adapter must keep out of what is protected, got {leak:.1e} of a row of A inside it "
            f"[{slot.name}]. Pass project=True to drop that part of it; or, before the first task, merge it with "
            "PEFT (merge_and_unload) and make the keeper of the result, so that it is protected too."
        )
    if leak > LEAK:
        (a, *_), _ = project_rows([a], [q])
    return {"A": a, "B": b if update.scaling == scaling else b * (update.scaling / scaling)}
