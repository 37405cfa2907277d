"""What KeepLoRA remembers about a stock PeftModel between tasks, and how that is saved."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keeplora._calls import public
from keeplora._files import folder_named
from keeplora._version import __version__
from keeplora.lora import LoraAdapter, Target, TokenMask, merge_adapters, peft_checkpoint, require_module
from keeplora.lora.base_model import BaseModel
from keeplora.lora.quantised import dequantised, is_quantised
from keeplora.lora.update import Update
from keeplora.methods.base_weights import Hashes, hash_weights, inner_of_updates, inner_product, is_hashes
from keeplora.methods.bases import NARROW, NamedBases
from keeplora.methods.buffers import Buffers
from keeplora.methods.capacity import Capacity, layer_capacity
from keeplora.methods.card import Story, model_card, write_card
from keeplora.methods.keeplora.config import KeepLoraConfig
from keeplora.methods.method import LossFn
from keeplora.methods.published import base_note
from keeplora.methods.reading import is_counts, is_figures, is_names, is_shares, stored, stored_parts
from keeplora.methods.saved import UNREADABLE, Reading, check_method
from keeplora.methods.settings import plain
from keeplora.methods.shares import Shares
from keeplora.methods.state import State, StateError, read_state, write_state

from .adapter import PeftAdapter, PeftLayer, borrow, find_adapter, find_layers, hold_buffers
from .fingerprints import fingerprint, frozen_fingerprint, named_weights, of_repacking

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

__all__ = ["SubspaceState"]

METHOD = "keeplora-peft"


@dataclass
class SubspaceState:
    """Protected bases and merged updates of a stock ``PeftModel``, from one task to the next.

    [`keeplora.initialize`][] makes it, [`keeplora.update_subspace`][] extends it. Save it beside the adapter; all
    of a run is then in one folder:

        peft_model.save_pretrained(folder)      # adapter_model.safetensors, adapter_config.json
        state.save(folder)                      # state.json, tensors-*.safetensors

        peft_model = PeftModel.from_pretrained(base, folder, is_trainable=True)
        state = keeplora.SubspaceState.load(folder)
        state.restore(peft_model)               # merges what was learned, freezes A again

    Attributes:
        config: Settings, without those that ``LoraConfig`` makes (r, alpha, dropout).
        parts: Layer name → what the base weight protects, and what each task added, in columns ``[in, k_t]`` that never
            change. Read them through ``bases``: those of a base weight in half precision are kept in float16.
        tasks_learned: Tasks closed by [`keeplora.update_subspace`][].
        open_adapter: The adapter that is being trained, or None between tasks.
        kept: Adapters of earlier tasks that were not merged and must stay active.
    """

    config: KeepLoraConfig
    targets: tuple[Target, ...] = ()
    parts: dict[str, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)
    free_shares: dict[str, Shares] = field(default_factory=dict)
    """Layer name → which share of the last task's gradient energy lay in free space, and of the open one's."""
    learned: list[dict[str, Update]] = field(default_factory=list)
    """By task and layer what was merged, with the scaling in B, on the CPU."""
    tasks_learned: int = 0
    open_adapter: str | None = None
    kept: tuple[str, ...] = ()
    also_train: tuple[str, ...] = ()
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    pretrained: str = ""
    current: str = ""
    frozen: str = ""
    """Of everything in the base model that is not adapted."""
    base_hashes: Hashes = field(default_factory=dict, repr=False)
    """Of the adapted weights as they were before the first task."""
    certificates: list[dict[str, float] | None] = field(default_factory=list)
    """The worst figures of every closed task; None of an adapter that was trained before."""
    masters: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Merged weights of half-precision layers before rounding; made again by [`restore`][]."""
    loss_fn: LossFn | None = field(default=None, repr=False)
    token_mask: TokenMask | None = field(default=None, repr=False)
    """What the open task was initialised with; not saved, like its ``loss_fn``."""

    @property
    def bases(self) -> Mapping[str, Tensor]:
        """Layer name → protected orthonormal basis ``[in, k]``, joined whenever one is asked for."""
        return NamedBases(self.parts)

    @property
    def added(self) -> dict[str, tuple[int, ...]]:
        """Layer name → how many directions each task added."""
        return {name: tuple(part.shape[1] for part in parts[1:]) for name, parts in self.parts.items()}

    def capacity(self) -> Capacity:
        """Room that is left, as [`keeplora.KeepLora.capacity`][]."""
        added, layers = self.added, []
        for target in self.targets:
            width, of_weight = self.parts[target.name][0].shape
            new, share = added[target.name], self.free_shares[target.name].last
            layers.append(layer_capacity(target, width, of_weight + sum(new), new, self.ranks[target.name], share))
        return Capacity(tuple(layers), self.tasks_learned)

    @public
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a folder: safetensors and JSON, atomically, without pickle.

        What an earlier save of this process, or the load, has on disk is not written again.
        """
        tensors = {f"{name}.basis.{i}": part for name, parts in self.parts.items() for i, part in enumerate(parts)}
        for task, updates in enumerate(self.learned):
            for name, update in updates.items():
                tensors |= {f"{name}.learned.{task}.A": update.a, f"{name}.learned.{task}.B": update.b}
        meta = {
            "method": METHOD,
            "config": self.config.to_dict(),
            "targets": [[target.name, target.depth, target.tower] for target in self.targets],
            "added": {name: list(counts) for name, counts in self.added.items()},
            "free_shares": {name: list(pair) for name, pair in self.free_shares.items()},
            "learned": [sorted(updates) for updates in self.learned],
            "tasks_learned": self.tasks_learned,
            "open_adapter": self.open_adapter,
            "kept": list(self.kept),
            "also_train": list(self.also_train),
            "ranks": self.ranks,
            "alphas": self.alphas,
            "pretrained": self.pretrained,
            "current": self.current,
            "frozen": self.frozen,
            "base_weights": self.base_hashes,
            "certificates": self.certificates,
            "versions": {"keeplora": __version__, "torch": torch.__version__},
        }
        write_state(path, State(tensors, meta, frozenset(tensors)))

    @classmethod
    @public
    def load(cls, path: str | os.PathLike[str]) -> SubspaceState:
        """Read what [`save`][] wrote.

        Raises:
            StateError: nothing there, damaged, incomplete, of a newer version, or of another method.
        """
        state = read_state(path)
        check_method(METHOD, state, f"load: {os.fspath(path)}")
        meta, tensors = Reading(state.meta), Reading(state.tensors)
        try:
            targets = tuple(Target(n, n, "weight", None, depth, tower) for n, depth, tower in meta["targets"])
            loaded = cls(
                config=KeepLoraConfig(**meta["config"]),
                targets=targets,
                parts={
                    target.name: tuple(
                        tensors[f"{target.name}.basis.{i}"] for i in range(1 + len(meta["added"][target.name]))
                    )
                    for target in targets
                },
                free_shares={name: Shares(*pair) for name, pair in meta["free_shares"].items()},
                learned=[
                    {n: Update(tensors[f"{n}.learned.{task}.A"], tensors[f"{n}.learned.{task}.B"]) for n in names}
                    for task, names in enumerate(meta["learned"])
                ],
                tasks_learned=meta["tasks_learned"],
                open_adapter=meta["open_adapter"],
                kept=tuple(meta["kept"]),
                also_train=tuple(meta["also_train"]),
                ranks=meta["ranks"],
                alphas=meta["alphas"],
                pretrained=meta["pretrained"],
                current=meta["current"],
                frozen=meta["frozen"],
                base_hashes=meta["base_weights"],
                certificates=meta["certificates"],
            )
            loaded._check(state)
        except StateError:
            raise
        except KeyError as error:
            raise StateError(f"load: {os.fspath(path)} must hold {error}, got a state without it") from None
        except UNREADABLE as error:
            raise StateError(
                f"load: {os.fspath(path)} must be whole, got values that cannot be read: {error}"
            ) from error
        tensors.require_all_read("tensors", METHOD)
        meta.require_all_read("meta", METHOD, besides=("method", "versions"))
        return loaded

    def _check(self, state: State) -> None:
        """Refuse a state whose bases protect nothing, whose updates fit no layer, or with values of another kind."""
        tasks, names = self.tasks_learned, [target.name for target in self.targets]
        if isinstance(tasks, bool) or not isinstance(tasks, int) or len(self.learned) != tasks:
            raise StateError(f"load: tasks_learned must count the {len(self.learned)} tasks of learned, got {tasks!r}")
        if not names or len(set(names)) < len(names):
            raise StateError(f"load: targets must be layers, each once, got {names}")
        for target in self.targets:
            if not (type(target.name) is type(target.tower) is str and type(target.depth) is int):
                raise StateError(f"load: targets must have a name, a depth and a tower, got {target}")
        added = state.meta["added"]
        if set(added) != set(names) or not is_counts([added[name] for name in names], len(names), tasks):
            raise StateError(f"load: added must have {tasks} numbers for each of {len(names)} layers, got {added}")
        for what, values, kinds in (("ranks", self.ranks, (int,)), ("alphas", self.alphas, (int, float))):
            if set(values) != set(names) or not all(type(v) in kinds and 0 <= v < math.inf for v in values.values()):
                raise StateError(
                    f"load: {what} must be a number of at least 0 for each of {len(names)} layers, got {values}"
                )
        for what in ("kept", "also_train"):
            if not is_names(state.meta[what]):
                raise StateError(f"load: {what} must be names, got {state.meta[what]!r}")
        texts = [self.pretrained, self.current, self.frozen, "" if self.open_adapter is None else self.open_adapter]
        if not is_names(texts):
            raise StateError(f"load: fingerprints and open_adapter must be texts, got {texts!r}")
        if not is_hashes(self.base_hashes) or set(self.base_hashes) != {f"{name}.weight" for name in names}:
            raise StateError(f"load: base_weights must be hashes of {len(names)} weights, got {self.base_hashes!r}")
        if not is_figures(self.certificates, tasks):
            raise StateError(f"load: certificates must be figures of {tasks} tasks, got {self.certificates!r}")
        strangers = [name for updates in self.learned for name in updates if name not in names]
        if strangers:
            raise StateError(f"load: learned must be of the {len(names)} targets, got {strangers}")
        if not is_shares([list(self.free_shares.get(name, ())) for name in names], len(names), 2):
            raise StateError(
                f"load: free_shares must have two numbers in [0, 1], or null, for each of {len(names)} layers, got "
                f"{self.free_shares}"
            )
        for name in names:
            first = self.parts[name][0]
            stored_parts(state, f"{name}.basis", None, [None, *added[name]], narrow=first.dtype == NARROW)
            width = len(first)
            for task in (i for i, updates in enumerate(self.learned) if name in updates):
                a = stored(state, f"{name}.learned.{task}.A", (None, width))
                stored(state, f"{name}.learned.{task}.B", (None, len(a)))

    @public
    def restore(self, model: Any) -> None:
        """Bring a ``PeftModel`` that was just loaded to where this state was saved.

        What earlier tasks merged is merged again, task by task, in the same arithmetic, so training goes on as if it
        had never stopped; a base model that was saved merged is left as it is. If a task is open, A is frozen and B
        trained: ``from_pretrained(..., is_trainable=True)`` had unfrozen both.

        Raises:
            StateError: the base weights are neither the pretrained ones nor those after the last merge, or something
                else in the base model is different.
            RuntimeError, TypeError, ValueError: as [`keeplora.initialize`][], of the model's adapters.
        """
        adapter = self.adapter_of("restore", model, self.open_adapter or (self.kept[-1] if self.kept else None))
        held = fingerprint(adapter.layers)
        if frozen_fingerprint(adapter, self.also_train) != self.frozen:
            raise StateError(
                "restore: the base model's other weights and buffers must be those the state was made with, got "
                f"different ones. Load the same base model.{of_repacking(adapter.layers)}"
            )
        for layer in adapter.layers:
            sizes = (layer.base.out_features, layer.base.in_features)
            for update in (updates[layer.name] for updates in self.learned if layer.name in updates):
                if (update.b.shape[0], update.a.shape[1]) != sizes:
                    raise StateError(
                        f"restore: the state's updates must be for a weight of {list(sizes)}, got "
                        f"{[update.b.shape[0], update.a.shape[1]]} [{layer.name}]"
                    )
        if held == self.pretrained:
            for updates in self.learned:
                self._merge(adapter, updates)
            self.current = fingerprint(adapter.layers)
        elif held != self.current:
            raise StateError(
                "restore: the model's base weights must be the pretrained ones the state began with, or those after "
                f"task {self.tasks_learned} (fingerprint {self.current[:12]}), got {held[:12]}. Load the same base "
                f"model.{of_repacking(adapter.layers)}"
            )
        if self.open_adapter is not None:
            adapter.freeze(self.kept)
            hold_buffers("restore", adapter, Buffers(adapter.base, self.also_train))

    @public
    def export_peft(
        self,
        path: str | os.PathLike[str],
        model: Any,
        *,
        base_model: str | None = None,
        revision: str | None = None,
        task_type: str | None = None,
        training: Mapping[str, Any] | None = None,
        card: ModelCardData | None = None,
    ) -> None:
        """Write everything learned as one adapter for the pretrained model, of the tasks' ranks together.

        What was merged, and the adapters that were kept beside it, with a model card: as
        [`keeplora.KeepLora.export_peft`][]. The adapter of an open task is PEFT's own to save.

        Args:
            path: A folder; an adapter and a card of keeplora's in it are replaced, other files stay.
            model: The ``PeftModel``; or, where no adapter was kept, the model it was made of.
            base_model: As of [`keeplora.KeepLora.export_peft`][], as are all that follow.
            revision: Of the base model.
            task_type: PEFT's.
            training: For the card.
            card: Metadata of your own.

        Raises:
            ValueError: nothing was learned; adapters were kept, and the model is no ``PeftModel`` that has them.
        """
        folder = folder_named("export_peft", path)
        require_module("export_peft", model)
        kept = [find_layers("export_peft", model, name) for name in self.kept]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        layers, weights, merged = {}, [], []
        for target in self.targets:
            module = base.get_submodule(target.name)
            layer = getattr(module, "base_layer", module)
            parts = [task[target.name] for task in self.learned if target.name in task]
            weights.append(dequantised(layer, comparable=True) if is_quantised(layer.weight) else layer.weight)
            merged.append(Update.total(parts, *weights[-1].shape))
            parts += [found[target.name].update(weights[-1].dtype) for found in kept if target.name in found]
            layers[target.name] = Update.total(parts, *weights[-1].shape)
        untouched = self.base_hashes == hash_weights(named_weights(self.targets, weights))
        about = BaseModel.of(base, name=base_model, revision=revision, task_type=task_type)
        updates = list(layers.values())
        inner = inner_product(weights, updates)
        inner -= 0.0 if untouched else sum(map(inner_of_updates, merged, updates))
        note = base_note(about, self.base_hashes, 0, inner)
        peft_checkpoint.write(folder, base, layers, about, note=note)
        story = Story(
            METHOD, plain(self.config), self.tasks_learned, about, tuple(self.certificates), self.capacity(),
            training=training or {},
        )  # fmt: skip
        write_card(folder, model_card(story, card))

    def adapter_of(self, function: str, model: Any, name: str | None) -> PeftAdapter:
        """The adapter in ``model``, with the layers this state knows."""
        kept = [other for other in self.kept if other != name]
        adapter = find_adapter(function, model, name, targets=self.targets, kept=kept)
        missing = {target.name for target in self.targets} - {layer.name for layer in adapter.layers}
        if missing:
            raise ValueError(
                f"{function}: the adapter must be on the {len(self.targets)} layers of the state, got "
                f"{len(missing)} without it (first: {min(missing)}). Use the same target_modules for every task."
            )
        return adapter

    def require_base(self, function: str, layers: Sequence[PeftLayer]) -> None:
        """Refuse a base model whose weights are not those that the last task left."""
        held = fingerprint(layers)
        if held == self.current:
            return
        if held == self.pretrained:
            raise RuntimeError(
                f"{function}: the base model must hold what {self.tasks_learned} tasks merged, got the pretrained "
                "weights. Call state.restore(peft_model) first."
            )
        raise RuntimeError(
            f"{function}: the base weights must be those after task {self.tasks_learned} (fingerprint "
            f"{self.current[:12]}), got {held[:12]}: what the state protects belongs to another model. Let "
            f"update_subspace merge, and take adapters out with model.unload().{of_repacking(layers)}"
        )

    def _merge(self, adapter: PeftAdapter, updates: Mapping[str, Update]) -> None:
        with borrow(adapter, self.masters) as slots:
            for slot in slots:
                if slot.name in updates:
                    update, device = updates[slot.name], slot.weight.device
                    slot.attach(LoraAdapter(update.a.to(device), update.b.to(device), 1.0))
            merge_adapters(slots)
