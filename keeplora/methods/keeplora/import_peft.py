"""A stock PEFT checkpoint as adapters that keep out of what is protected."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from keeplora.lora import LoraSlot, peft_checkpoint
from keeplora.lora.update import Update
from keeplora.methods.base_weights import Hashes, SlotWeights, base_fault
from keeplora.methods.saved import UNREADABLE
from keeplora.methods.state import StateError
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
    original: Hashes | None = None,
    other_base: bool = False,
) -> list[dict[str, Tensor] | None]:
    """A and B of every slot that the checkpoint adapts, with the slot's scaling; see ``KeepLora.import_peft``."""
    try:
        updates = peft_checkpoint.split(slots, peft_checkpoint.read(path))
        note = None if other_base else peft_checkpoint.read_note(path)
    except (OSError, *UNREADABLE) as error:
        ours = str(error).startswith("import_peft: ")
        said = f"{os.fspath(path)} must be an adapter of PEFT's, got one that cannot be read: {error}"
        raise StateError(str(error) if ours else f"import_peft: {said}") from error
    if not updates:
        raise StateError(f"import_peft: {os.fspath(path)} must hold an update of the targets, got B = 0 everywhere")
    held = [i for i, slot in enumerate(slots) if slot.name in updates]
    _check_base(path, note, slots, updates, original)
    for i in held:
        if scalings[i] == 0:
            raise StateError(
                f"import_peft: depth_scale must not be 0 where the adapter has an update [{slots[i].name}]"
            )
    rows = {i: updates[slots[i].name].a.to(bases[i]) for i in held}
    leaks = {i: leak_of_rows(a, bases[i]) for i, a in rows.items()}
    astray = [i for i in held if leaks[i] > LEAK]
    if astray and not project:
        worst = max(astray, key=leaks.__getitem__)
        raise StateError(
            f"import_peft: the adapter must keep out of what is protected, got {leaks[worst]:.1e} of a row of A inside "
            f"it [{slots[worst].name}, the worst of {len(astray)} layers]. Pass project=True to drop that part of it; "
            "or, before the first task, merge it with PEFT (merge_and_unload) and make the keeper of the result, so "
            "that it is protected too; or keep it as an adapter of a PeftModel with keeplora.keep_adapter."
        )
    if astray:
        projected, _ = project_rows([rows[i] for i in astray], [bases[i] for i in astray])
        rows |= dict(zip(astray, projected, strict=True))
    parts: list[dict[str, Tensor] | None] = [None] * len(slots)
    for i, a in rows.items():
        update = updates[slots[i].name]
        b = update.b.to(a)
        scaled = b if update.scaling == scalings[i] else b * (update.scaling / scalings[i])
        if not bool(torch.isfinite(scaled).all()):
            raise StateError(f"import_peft: lora_alpha must leave B finite, got NaN or Inf [{slots[i].name}]")
        parts[i] = {"A": a, "B": scaled}
    return parts


def _check_base(
    path: str | os.PathLike[str],
    note: Mapping[str, Any] | None,
    slots: Sequence[LoraSlot],
    updates: Mapping[str, Update],
    original: Hashes | None,
) -> None:
    """Refuse an adapter that was made for other weights, as far as its folder tells."""
    changed = [slot for slot in slots if slot.name in updates]
    fault = None if note is None else base_fault(
        note, SlotWeights(slots), original, (slot.exact_weight for slot in changed),
        [updates[slot.name] for slot in changed],
    )  # fmt: skip
    if note is None or fault is None:
        return
    held = note.get("tasks_in_base")
    wanted = f"the base model with {held} tasks merged" if held else "the original base model"
    raise StateError(
        f"import_peft: the model must be the one that {os.fspath(path)} was made for ({wanted}, "
        f"{note.get('base_model') or 'without a name'}), got {fault}. Load that model, or pass other_base=True if this "
        "one is meant."
    )
