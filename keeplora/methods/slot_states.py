"""What adapted weights are in a state: merged updates, adapters, weights of other origin; nothing is taken on trust."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from keeplora.distributed import average_gradients, processes
from keeplora.lora import LoraAdapter, LoraSlot
from keeplora.lora.exact import hash_of
from keeplora.lora.shares import LocalRows
from keeplora.lora.update import Update

from .base_weights import Hashes, SlotWeights, is_hashes
from .buffers import Buffers, model_buffers, set_buffers
from .fingerprint import fingerprint
from .flags import freeze
from .method import Method
from .reading import is_figures, is_names, stored, stored_like
from .shared_sums import all_rows, hashes_everywhere
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

    def average_gradients(self) -> None:
        """Where adapters are outside of FSDP2, which averages gradients of its own parameters alone."""
        if self.shared_out:
            average_gradients([parameter for _, parameter in self.named_trained()], processes(self.group))

    def weights_state(self) -> State:
        """What was merged into the pretrained weights, and the adapters that slots hold.

        A weight itself is in it where it is more than that: where whole weights are trained, or somebody has written to
        it.
        """
        return self._weights_state(whole=False)

    def _weights_state(self, *, whole: bool) -> State:
        tensors: dict[str, Tensor] = {}
        lasting: set[str] = set()
        held: dict[str, list[str]] = {}
        learned: dict[str, list[float] | None] = {}
        weights, sums, altered, pretrained = [], [], [], {}
        for slot in self.slots:
            name, exact = slot.name, slot.exact
            exact.settle(slot.local.rows)
            if slot.adapter is not None:
                mine = slot.adapter.tensors()
                held[name] = sorted(mine)
                tensors |= {f"{name}.adapter.{key}": tensor for key, tensor in mine.items()}
            learned[name] = None if exact.learned is None else [update.scaling for update in exact.learned]
            for task, update in enumerate(exact.learned or ()):
                merged = {f"{name}.learned.{task}.A": update.a, f"{name}.learned.{task}.B": update.b}
                tensors |= merged
                lasting |= set(merged)
            if exact.total is not None:
                sums.append(name)
                tensors[f"{name}.total"] = exact.total
                lasting.add(f"{name}.total")
            if not exact.follows or (whole and not exact.at_hand):
                weights.append(slot)
            if not exact.known:
                altered.append(name)
            if not self.shared_out:
                pretrained[name] = exact.pretrained_hash(slot.weight) if exact.known else ""
        if self.shared_out:
            self._require_known()
            pretrained = self.pretrained_hashes()
        every = self.whole(weights, (slot.exact_weight for slot in weights))
        tensors |= {f"{slot.name}.weight": weight for slot, weight in every.items()}
        meta = {
            "targets": [slot.name for slot in self.slots],
            "frozen": fingerprint(self.model, self.slots, buffers=self.frozen_buffers, remembered=True),
            "pretrained": pretrained,
            "adapters": held,
            "learned": learned,
            "totals": sums,
            "weights": [slot.name for slot in weights],
            "altered": altered,
            "base_weights": self.base_hashes,
            "certificates": list(self.certificates),
        }
        return State(tensors | self._moving_buffers(), meta, frozenset(lasting))

    def pretrained_hashes(self) -> dict[str, str]:
        """Of W₀ of every slot, whose rows lie in several processes, by name; remembered with the weights."""
        follow = [slot for slot in self.slots if slot.exact.learned is not None]  # the same ones everywhere
        unknown = [slot for slot in follow if slot.exact.origin is None or not slot.exact.merged_into]
        found = hashes_everywhere([(slot.local, slot.weight.shape) for slot in unknown])
        for slot, text in zip(unknown, found, strict=True):
            slot.exact.origin = text
        return {slot.name: slot.exact.origin or "" for slot in self.slots}

    def _require_known(self) -> None:
        """Rows that somebody has written to in any process are nowhere whole, and cannot be saved."""
        mine = [slot.name for slot in self.slots if not slot.exact.known and slot.exact.learned is not None]
        written = next((names[0] for names in processes().gather(mine) if names), None)
        if written is not None:
            raise StateError(
                f"save: weights that FSDP2 shares out must be pretrained ones and what was merged, got one that "
                f"something else has been written to [{written}]. Save on one process that holds the whole model."
            )

    def whole(self, slots: Sequence[LoraSlot], rows: Iterable[Tensor]) -> dict[LoraSlot, Tensor]:
        """Matrices of slots, of which each process may have some rows alone: all rows in the one that writes them."""
        if not self.shared_out or not slots:
            return dict(zip(slots, rows, strict=True))
        parts = (
            (LocalRows(mine.to(slot.weight.device), slot.local.first), len(slot.weight))
            for slot, mine in zip(slots, rows, strict=True)
        )
        return dict(zip(slots, all_rows(parts), strict=True))

    def whole_weights_state(self) -> State:
        """[`weights_state`][], with every weight that could not be had again from this object."""
        return self._weights_state(whole=True)

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
        held = meta.get("adapters")
        if not isinstance(held, dict) or not set(held) <= set(names) or not all(map(is_names, held.values())):
            raise StateError(f"load_state: adapters must be names of tensors by target, got {held!r}")
        if held and not meta["training_task"] and not self.rests_with_adapters:
            raise StateError(f"load_state: adapters must be none between tasks of {self.name!r}, got {len(held)}")
        learned, pretrained = meta.get("learned"), meta.get("pretrained")
        if not isinstance(learned, dict) or set(learned) != set(names) or not all(map(_are_scalings, learned.values())):
            raise StateError(f"load_state: learned must be scalings of updates, or null, by target, got {learned!r}")
        if not isinstance(pretrained, dict) or [*map(type, map(pretrained.get, names))] != [str] * len(pretrained):
            raise StateError(f"load_state: pretrained must be a hash by target, got {pretrained!r}")
        for key in ("totals", "weights", "altered"):
            value = meta.get(key)
            if not is_names(value) or value != [name for name in names if name in value]:
                raise StateError(f"load_state: {key} must be names of targets in their order, got {value!r}")
        marks = {
            name: _Marks(name in meta["totals"], name in meta["weights"], name in meta["altered"], pretrained[name])
            for name in names
        }
        self._starts = dict(pretrained)
        if self.shared_out:
            held_here = [(slot, slot.exact.pretrained(slot.local.rows.detach())) for slot in self.slots]
            rows = [LocalRows(slot.local.rows[:0] if w is None else w, slot.local.first) for slot, w in held_here]
            whole = hashes_everywhere([(r, s.weight.shape) for r, s in zip(rows, self.slots, strict=True)])
            self._starts = dict(zip(names, whole, strict=True))
        slots = [self._recall_slot(state, i, held.get(n), learned[n], marks[n]) for i, n in enumerate(names)]
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
        own = SlotWeights(self.slots)
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

    def _recall_slot(
        self, state: State, i: int, held: list[str] | None, scalings: list[float] | None, marks: _Marks
    ) -> _SlotState:
        slot = self.slots[i]
        out, width = slot.weight.shape
        exact = slot.exact_dtype
        weight = stored(state, f"{slot.name}.weight", (out, width), dtype=exact) if marks.weight else None
        total = stored(state, f"{slot.name}.total", (out, width), dtype=exact) if marks.total else None
        adapter = None
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
        learned: list[Update] | None = None if scalings is None else []
        for task, scaling in enumerate(scalings or ()):
            a = stored(state, f"{slot.name}.learned.{task}.A", (None, width), dtype=exact)
            b = stored(state, f"{slot.name}.learned.{task}.B", (out, len(a)), dtype=exact)
            assert learned is not None
            learned.append(Update(a, b, float(scaling)))
        if (learned is None and (total is not None or not marks.altered)) or (marks.altered and weight is None):
            raise StateError(f"load_state: {slot.name} must have a weight or the updates it is made of, got neither")
        if marks.altered and marks.pretrained:
            raise StateError(
                f"load_state: pretrained must be empty of a weight that does not follow from it, got "
                f"{marks.pretrained!r} [{slot.name}]"
            )
        if weight is not None and slot.keeps:
            raise StateError(
                f"load_state: weights must not be in the state of a model whose updates are kept beside them, got one "
                f"[{slot.name}]"
            )
        if weight is None:
            self._check_start(slot, learned or [], total, marks.pretrained)
        return _SlotState(weight, adapter, learned, total, marks)

    def _check_start(self, slot: LoraSlot, learned: list[Update], total: Tensor | None, pretrained: str) -> None:
        """Refuse what does not follow from the weight that is here, or leaves the numbers of its dtype."""
        start = slot.exact.pretrained(slot.local.rows.detach())
        if start is None or (self._starts[slot.name] if self.shared_out else hash_of(start)) != pretrained:
            got = "none, since tasks were merged into them" if start is None else "others"
            raise StateError(
                f"load_state: weights must be the pretrained ones that the state was made with, got {got} "
                f"[{slot.name}]. Load the same pretrained model first."
            )
        parts = [start] if total is None else [start, total]
        largest = sum(float(part.abs().max()) for part in parts if part.numel())
        for update in learned:
            if update.rank:
                largest += abs(update.scaling) * update.rank * float(update.a.abs().max()) * float(update.b.abs().max())
        if not largest < torch.finfo(slot.weight.dtype).max and (learned or total is not None):
            raise StateError(f"load_state: updates must be within {slot.weight.dtype}, got {largest:.1e} [{slot.name}]")

    def set_weights(self, weights: _Weights, *, open_task: bool) -> None:
        self.base_hashes, self.certificates = weights.base_hashes, list(weights.certificates)
        if open_task:
            freeze(self.model)  # the adapters bring their own flags
            set_buffers(self.model, weights.before)
            self._buffers = Buffers(self.model, frozen=self.frozen_buffers)
        set_buffers(self.model, weights.buffers)
        for slot, (weight, adapter, learned, total, marks) in zip(self.slots, weights.slots, strict=True):
            slot.detach()
            with torch.no_grad():
                rows = slot.local
                exact = None if weight is None else rows.of(weight)
                slot.exact.restore(
                    rows.rows, exact, learned, total, known=not marks.altered, pretrained=marks.pretrained
                )
            if adapter is not None:
                slot.attach(adapter)
        self.average_gradients()


class _Weights(NamedTuple):
    """What a state holds: of the slots, and buffers where they may move, as they are and as the open task began."""

    slots: list[_SlotState]
    buffers: dict[str, Tensor]
    before: dict[str, Tensor]
    base_hashes: Hashes | None
    certificates: list[dict[str, float] | None]


class _Marks(NamedTuple):
    """What a state says of one slot: which tensors it has, whether more than updates was written, the hash of W₀."""

    total: bool
    weight: bool
    altered: bool
    pretrained: str


class _SlotState(NamedTuple):
    """What a state holds of one slot; no weight where it follows from the pretrained one."""

    weight: Tensor | None
    adapter: LoraAdapter | None
    learned: list[Update] | None
    total: Tensor | None
    marks: _Marks


def _are_scalings(value: Any) -> bool:
    """Whether a JSON value is null or a list of finite numbers, each a float to the last digit."""
    return value is None or (
        isinstance(value, list) and all(type(c) in (int, float) and math.isfinite(c) and float(c) == c for c in value)
    )
