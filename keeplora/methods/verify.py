"""Does a saved state of KeepLora fit the model it is loaded into?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import nn

from keeplora.lora import LoraSlot

from .state import State, StateError

__all__ = ["added_by_task", "check_state", "fingerprint"]


def check_state(state: State, method: str, model: nn.Module, slots: Sequence[LoraSlot]) -> None:
    """Refuse a state that does not fit, before anything of it is used.

    Raises:
        StateError: another method, another model or other targets, or something is missing or of another shape.
    """
    meta, names = state.meta, [slot.name for slot in slots]
    if meta.get("method") != method:
        raise StateError(f"load_state: state must be of method {method!r}, got {meta.get('method')!r}")
    missing = {"targets", "tasks_learned", "training_task", "added", "frozen"} - set(meta)
    if missing:
        raise StateError(f"load_state: state must hold {', '.join(sorted(missing))}, got {sorted(meta)}")
    if meta["targets"] != names:
        raise StateError(
            f"load_state: state must have the targets of this model, got {len(meta['targets'])} others. "
            "Load it into the model it was made with."
        )
    if meta["frozen"] != fingerprint(model, slots):
        raise StateError(
            "load_state: the model's other weights must be those the state was made with, got different ones. "
            "Load the same pretrained weights first; only adapted weights are in the state."
        )
    if meta["added"] is not None and len(meta["added"]) != len(names):
        raise StateError(f"load_state: added must have {len(names)} entries, got {len(meta['added'])}")
    history = added_by_task(state)
    if history is not None and (len(history) != len(names) or len(set(map(len, history))) > 1):
        raise StateError("load_state: added_by_task must have one row per target, all equally long, got others")
    for slot in slots:
        out, width = slot.weight.shape
        adapter, rank = f"{slot.name}.A" in state.tensors, _size(state, f"{slot.name}.A", 0)
        shapes = {"weight": [out, width]}
        if meta["added"] is not None:
            shapes["basis"] = [width, _size(state, f"{slot.name}.basis", 1)]
        if adapter:
            shapes |= {"A": [rank, width], "B": [out, rank]}
        if f"{slot.name}.origin" in state.tensors:
            shapes["origin"] = [out, rank]
        if f"{slot.name}.learned.A" in state.tensors:
            learned = _size(state, f"{slot.name}.learned.A", 0)
            shapes |= {"learned.A": [learned, width], "learned.B": [out, learned]}
        for key, shape in shapes.items():
            tensor = state.tensors.get(f"{slot.name}.{key}")
            if tensor is None or list(tensor.shape) != shape:
                got = None if tensor is None else list(tensor.shape)
                raise StateError(f"load_state: {key} must have shape {shape}, got {got} [{slot.name}]")


def added_by_task(state: State) -> list[tuple[int, ...]] | None:
    """Directions each task added to each slot's basis; of states from before that was kept, the last task's alone.

    None where no basis was made yet.
    """
    meta = state.meta
    if meta["added"] is None:
        return None
    if "added_by_task" in meta:
        return [tuple(row) for row in meta["added_by_task"]]
    return [(count,) if meta["tasks_learned"] else () for count in meta["added"]]


def fingerprint(model: nn.Module, slots: Sequence[LoraSlot]) -> str:
    """A hash of the weights that no task changes: names, shapes and up to 64 values of each."""
    adapted = {id(getattr(slot.host, slot.host.slots[slot.slot][0])) for slot in slots}
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if id(parameter) in adapted or {"adapters", "keeplora_head"} & set(name.split(".")):
            continue
        values = parameter.detach().flatten()
        values = values[:: max(1, values.numel() // 64)][:64].double().cpu()
        digest.update(f"{name} {list(parameter.shape)} {values.tolist()}".encode())
    return digest.hexdigest()


def _size(state: State, name: str, axis: int) -> int:
    """The size of a matrix in the state; -1, which no shape has, where it is missing or no matrix."""
    tensor = state.tensors.get(name)
    return tensor.shape[axis] if tensor is not None and tensor.dim() == 2 else -1
