"""KeepLora's updates as stock PEFT checkpoints, and stock checkpoints as KeepLora's open task."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from keeplora.integrations import peft_checkpoint
from keeplora.integrations.peft_checkpoint import Update
from keeplora.lora import LoraAdapter, LoraSlot
from keeplora.math.precision import full_precision
from keeplora.ops.project_rows import project_rows

from .state import write_atomic, write_json
from .trained import LEAK, leak_of_rows

if TYPE_CHECKING:
    from .keeplora import KeepLora

__all__ = ["confined", "export_peft", "open_updates", "write_peft"]


def export_peft(keeper: KeepLora, path: str | os.PathLike[str], *, open_task_only: bool) -> None:
    """Implements :meth:`keeplora.KeepLora.export_peft`."""
    updates = {}
    for slot in keeper.slots:
        parts = [] if open_task_only else _learned(slot)
        if slot.adapter is not None:
            adapter = slot.adapter
            parts.append(Update(adapter.A.detach(), adapter.update().detach(), adapter.scaling))
        out, width = slot.weight.shape
        updates[slot.name] = Update.total(parts, out, width)
    if peft_checkpoint.has_attention(slot for slot in keeper.slots if updates[slot.name].rank):
        warnings.warn(
            "export_peft: stock PEFT up to 0.21 applies the update of nn.MultiheadAttention's out_proj twice "
            "(huggingface/peft#3774), so its outputs differ from this model's. Load with import_peft, or with a "
            "release that has the fix.",
            UserWarning,
            stacklevel=3,
        )
    write_peft(path, keeper.model, peft_checkpoint.layers_of(keeper.model, keeper.slots, updates))


def write_peft(path: str | os.PathLike[str], model: nn.Module, layers: Mapping[str, Update]) -> None:
    """Write a stock checkpoint; a reader meets the old one, the new one, or none, never a mix of two."""
    tensors, config = peft_checkpoint.checkpoint(model, layers)
    folder = Path(path)
    (folder / peft_checkpoint.ADAPTER_CONFIG).unlink(missing_ok=True)
    write_atomic(folder / peft_checkpoint.ADAPTER_TENSORS, lambda temporary: save_file(tensors, temporary))
    write_json(folder / peft_checkpoint.ADAPTER_CONFIG, config)


def _learned(slot: LoraSlot) -> list[Update]:
    learned = slot.host.learned.get(slot.slot, [])
    if learned is None:
        raise RuntimeError(
            "export_peft: the updates of every task must be known, got a state from before they were kept. "
            "Export the open task alone with open_task_only=True, or save the merged model."
        )
    return [Update(a, b) for a, b in learned]
