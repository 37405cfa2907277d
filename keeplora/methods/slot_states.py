"""What adapted weights are in a state: exact weights, adapters and merged updates; nothing is taken on trust."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from keeplora.lora import LoraAdapter, LoraSlot

from .base_weights import Hashes, is_hashes, slot_weights
from .buffers import Buffers, model_buffers, set_buffers
from .fingerprint import fingerprint
from .method import Method, freeze
from .reading import is_figures, is_names, stored, stored_like
from .state import State, StateError

__all__ = ["SlotStates"]

SAVED = (torch.float32, torch.float64, torch.int64, torch.bool)
"""Dtypes of an adapter's tensors."""


class SlotStates(Method):
    """A method whose weights are in slots."""

    slots: list[LoraSlot]
    base_hashes: Hashes | None = None
    """Of the weights as they were before the first task; None as long as nothing was merged."""
    certificates: list[dict[str, float] | None]
    """The worst figures of every closed task; None where the method gives no certificate."""
    rests_with_adapters: ClassVar[bool] = False
    """Whether slots hold adapters between tasks too: what cannot be merged."""

    @abstractmethod
    def adapter_of(self, i: int, tensors: Mapping[str, Tensor]) -> LoraAdapter:
        """The adapter of slot ``i`` with these tensors, as its ``tensors()`` gave them."""

    def weights_state(self) -> State:
        """Exact weights, the adapters that slots hold, and the updates that were merged."""
        tensors: dict[str, Tensor] = {}
        held: dict[str, list[str]] = {}
        for slot in self.slots:
            tensors[f"{slot.name}.weight"] = slot.exact_weight
            if slot.adapter is not None:
                mine = slot.adapter.tensors()
                held[slot.name] = sorted(mine)
                tensors |= {f"{slot.name}.adapter.{key}": tensor for key, tensor in mine.items()}
            if slot.learned is not None:
                out, width = slot.weight.shape
                a, b = [a for a, _ in slot.learned], [b for _, b in slot.learned]
                tensors[f"{slot.name}.learned.A"] = torch.cat(a) if a else torch.zeros(0, width, dtype=slot.exact_dtype)
                tensors[f"{slot.name}.learned.B"] = (
                    torch.cat(b, dim=1) if b else torch.zeros(out, 0, dtype=slot.exact_dtype)
                )
        meta = {
            "targets": [slot.name for slot in self.slots],
            "frozen": fingerprint(self.model, self.slots, buffers=self.frozen_buffers, remembered=True),
            "adapters": held,
            "unknown_updates": [slot.name for slot in self.slots if slot.learned is None],
            "base_weights": self.base_hashes,
            "certificates": self.certificates,
        }
        return State(tensors | self._moving_buffers(), meta)

    def _moving_buffers(self) -> dict[str, Tensor]:
        """Buffers that a task may change, as they are and as the open task found them; none where all are frozen."""
        if self.frozen_buffers:
            return {}
        now = model_buffers(self.model)
        before = {} if self._buffers is None else {name: self._buffers.values[name] for name in now}
        named = {f"buffers.{name}": buffer for name, buffer in now.items()}
        return named | {f"buffers_before.{name}": buffer for name, buffer in before.items()}

    def recall_weights(self, state: State) -> _Weights:
        meta, names = state.meta, [slot.name for slot in self.slots]
        if meta.get("targets") != names:
            theirs = meta.get("targets")
            got = f"{len(theirs)} (first: {theirs[0]})" if isinstance(theirs, list) and theirs else repr(theirs)
            raise StateError(
                f"load_state: targets must be those of this model, {len(names)} (first: {names[0]}), got {got}. "
                "Load the state into the model it was made with."
            )
        if meta.get("frozen") != fingerprint(self.model, self.slots, buffers=self.frozen_buffers):
            raise StateError(
                "load_state: the model's other weights and buffers must be those the state was made with, got "
                "different ones. Load the same pretrained model first; only adapted weights are in the state."
            )
        held, unknown = meta.get("adapters"), meta.get("unknown_updates")
        if not isinstance(held, dict) or not set(held) <= set(names) or not all(map(is_names, held.values())):
            raise StateError(f"load_state: adapters must be names of tensors by target, got {held!r}")
        if held and not meta["training_task"] and not self.rests_with_adapters:
            raise StateError(f"load_state: adapters must be none between tasks of {self.name!r}, got {len(held)}")
        if not is_names(unknown) or not set(unknown) <= set(names):
            raise StateError(f"load_state: unknown_updates must be names of targets, got {unknown!r}")
        slots = [self._recall_slot(state, i, held.get(name), name in unknown) for i, name in enumerate(names)]
        hashes, certificates = self._recall_history(state)
        if self.frozen_buffers:
            return _Weights(slots, {}, {}, hashes, certificates)
        mine = model_buffers(self.model)
        now = {name: stored_like(state, f"buffers.{name}", buffer) for name, buffer in mine.items()}
        opened = mine if meta["training_task"] else {}
        before = {name: stored_like(state, f"buffers_before.{name}", buffer) for name, buffer in opened.items()}
        return _Weights(slots, now, before, hashes, certificates)

    def _recall_history(self, state: State) -> tuple[Hashes | None, list[dict[str, float] | None]]:
        hashes, certificates = state.meta.get("base_weights"), state.meta.get("certificates")
        own = slot_weights(self.slots)
        closed = state.meta["tasks_learned"] > 0
        whole = is_hashes(hashes) and set(hashes or ()) == set(own)
        if not (whole if closed else hashes is None):
            raise StateError(
                f"load_state: base_weights must be hashes of {len(own)} weights once a task is closed, else null, got "
                f"{hashes!r}"
            )
        if not is_figures(certificates, state.meta["tasks_learned"]):
            raise StateError(
                f"load_state: certificates must be figures of {state.meta['tasks_learned']} tasks, got {certificates!r}"
            )
        return hashes, certificates

    def _recall_slot(self, state: State, i: int, held: list[str] | None, unknown: bool) -> _SlotState:
        slot = self.slots[i]
        out, width = slot.weight.shape
        exact = slot.exact_dtype
        weight, adapter, learned = stored(state, f"{slot.name}.weight", (out, width), dtype=exact), None, None
        if held is not None:
            prefix = f"{slot.name}.adapter"
            rank = len(stored(state, f"{prefix}.A", (None, width), dtype=exact))
            stored(state, f"{prefix}.B", (out, rank), dtype=exact)
            if "origin" in held:
                stored(state, f"{prefix}.origin", (out, rank), dtype=exact)
            tensors = {key: state.tensors[f"{prefix}.{key}"] for key in held}
            adapter = self.adapter_of(i, tensors)
            made_of = adapter.tensors()
            for key in sorted(set(made_of) | set(tensors)):  # what comes back must be what was given
                given, made = tensors.get(key), made_of.get(key)
                if (
                    given is None
                    or made is None
                    or (given.shape, given.dtype) != (made.shape, made.dtype)
                    or made.dtype not in SAVED
                ):
                    got = None if given is None else f"{list(given.shape)} in {given.dtype}"
                    raise StateError(f"load_state: {prefix}.{key} must be of an adapter of {self.name!r}, got {got}")
                if not bool(torch.isfinite(made).all()):
                    raise StateError(f"load_state: {prefix}.{key} must be finite, got NaN or Inf")
        if not unknown:
            a = stored(state, f"{slot.name}.learned.A", (None, width), dtype=exact)
            b = stored(state, f"{slot.name}.learned.B", (out, len(a)), dtype=exact)
            learned = [(a, b)] if len(a) else []
        return _SlotState(weight, adapter, learned)

    def set_weights(self, weights: _Weights, *, open_task: bool) -> None:
        self.base_hashes, self.certificates = weights.base_hashes, list(weights.certificates)
        if open_task:
            freeze(self.model)  # the adapters bring their own flags
            set_buffers(self.model, weights.before)
            self._buffers = Buffers(self.model, frozen=self.frozen_buffers)
        set_buffers(self.model, weights.buffers)
        for slot, (weight, adapter, learned) in zip(self.slots, weights.slots, strict=True):
            slot.detach()
            slot.set_exact_weight(weight.to(slot.weight.device))
            slot.learned = learned
            if adapter is not None:
                slot.attach(adapter)


class _Weights(NamedTuple):
    """What a state holds: of the slots, and buffers where they may move, as they are and as the open task began."""

    slots: list[_SlotState]
    buffers: dict[str, Tensor]
    before: dict[str, Tensor]
    base_hashes: Hashes | None
    certificates: list[dict[str, float] | None]


class _SlotState(NamedTuple):
    """What a state holds of one slot."""

    weight: Tensor
    adapter: LoraAdapter | None
    learned: list[tuple[Tensor, Tensor]] | None
