"""What methods share that adapt chosen weights: slots, the order of calls, weights and memory as state."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from keeplora.distributed import processes
from keeplora.families import find_targets, token_mask
from keeplora.lora import LoraAdapter, LoraSlot, Target, merge_ahead, select_targets, unwrap, wrap
from keeplora.statistics import FeatureStatistic, feature_statistics

from .keeplora.adapters import attach, check_ranks
from .method import LossFn, Method, require_loss_fn
from .progress import for_all_layers, progress
from .settings import AdapterConfig
from .state import State, StateError
from .verify import fingerprint

__all__ = ["LoraMethod", "stored", "warn_of_small_adapters"]

T = TypeVar("T")


class _Config(Protocol):
    @property
    def target_modules(self) -> tuple[str, ...] | str: ...


class LoraMethod(Method):
    """A method that adapts the weights its config names in ``target_modules``.

    A subclass gives :meth:`open_task` and :meth:`close_task`, and, if it remembers anything between tasks but the
    merged weights, :meth:`memory_state` and :meth:`recall`. It is called only when a task may be opened or closed.

    Args:
        model: Any model with linear layers. Those that are adapted are replaced in place by ones that can hold
            adapters, until :meth:`merge`; it stays the same object.
        config: Settings, ``target_modules`` among them.
        targets: The weights to choose from, instead of what :func:`keeplora.families.find_targets` finds.
        progress: Whether passes over batches and layers draw bars on stderr; None: if that is a terminal.

    Raises:
        ValueError: ``target_modules`` matches nothing; r is larger than a layer's width; a weight is shared by two
            layers.
    """

    def __init__(
        self,
        model: nn.Module,
        config: _Config,
        *,
        targets: Sequence[Target] | None = None,
        progress: bool | None = None,
    ):
        self.model, self.progress = model, progress
        chosen = select_targets(find_targets(model) if targets is None else targets, config.target_modules)
        if isinstance(config, AdapterConfig):
            check_ranks(model, chosen, config.r, method=type(self).__name__)
        self.check_targets(model, chosen)
        self._flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.slots: list[LoraSlot] = wrap(model, chosen)
        self._hooks = merge_ahead(model)
        self._loss_fn: LossFn | None = None
        self.tasks_learned = 0
        self.training_task = False
        self._given_back = False

    # ------------------------------------------------------------------ what a method is

    def check_targets(self, model: nn.Module, targets: Sequence[Target]) -> None:
        """Refuse a model the method cannot handle, before anything of it is replaced."""

    @abstractmethod
    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        """Make what is trained. The model must not change its function, nor anything change on an error."""

    @abstractmethod
    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> Any:
        """Take in what was trained; returns the report. Whatever may fail comes before anything is changed."""

    def memory_state(self) -> State:
        """What is remembered between tasks: tensors by name, and JSON values."""
        return State()

    def recall(self, state: State) -> Any:
        """The memory in ``state``, checked and ready for :meth:`remember`; :class:`StateError` where it does not fit.

        Nothing is changed here.
        """

    def remember(self, memory: Any) -> None:
        """Go on with a memory from :meth:`recall`."""

    # ------------------------------------------------------------------ the life of a task

    def before_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        """Open a task; on an error nothing has changed.

        Raises:
            RuntimeError: a task is open already, or the model was given back by :meth:`merge`.
        """
        with processes().together():
            self._require("before_task", task=False)
            require_loss_fn(loss_fn)
            self.open_task(loader, loss_fn)
        self._loss_fn, self.training_task = loss_fn, True

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The open adapters' parameters that take gradients."""
        self._require("trainable_parameters", task=True)
        adapters = [slot.adapter for slot in self.slots if slot.adapter is not None]
        return [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]

    @torch.no_grad()
    def after_task(self, loader: Iterable[Any], loss_fn: LossFn | None = None) -> Any:
        """Close the open task; on an error nothing has changed.

        Raises:
            RuntimeError: no task is open.
            ValueError: what was trained is not finite (the layer is named).
        """
        with processes().together():
            self._require("after_task", task=True)
            forward = loss_fn or self._loss_fn
            assert forward is not None
            for slot in self.slots:
                slot.check_finite("after_task")
            report = self.close_task(loader, forward)
        self.tasks_learned += 1
        self.training_task = False
        return report

    def merge(self) -> nn.Module:
        """Give the model back with its ordinary layers and its gradient flags of before; see :meth:`Method.merge`."""
        self._require("merge", task=False)
        if not self.merges:
            return super().merge()
        unwrap(self.model)
        for hook in self._hooks:
            hook.remove()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))
        self._given_back = True
        return self.model

    # ------------------------------------------------------------------ state

    def state(self) -> State:
        """The adapted weights and the method's memory, on the CPU.

        Raises:
            RuntimeError: a task is open.
        """
        self._require("state", task=False)
        memory = self.memory_state()
        tensors = {f"{slot.name}.weight": slot.exact_weight for slot in self.slots} | memory.tensors
        meta = {
            "method": self.name,
            "targets": [slot.name for slot in self.slots],
            "tasks_learned": self.tasks_learned,
            "frozen": fingerprint(self.model, self.slots),
            **memory.meta,
        }
        return State({k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}, meta)

    def load_state(self, state: State) -> None:
        """Continue from ``state``. Everything is checked before anything changes.

        Raises:
            StateError: the state belongs to another method, another model or other targets, or is incomplete.
        """
        self._require("load_state", task=False)
        meta = state.meta
        if meta.get("method") != self.name:
            raise StateError(f"load_state: state must be of method {self.name!r}, got {meta.get('method')!r}")
        if meta.get("targets") != [slot.name for slot in self.slots] or not isinstance(meta.get("tasks_learned"), int):
            raise StateError("load_state: state must have the targets of this model, got others")
        if meta.get("frozen") != fingerprint(self.model, self.slots):
            raise StateError(
                "load_state: the model's other weights must be those the state was made with, got different ones. "
                "Load the same pretrained weights first; only adapted weights are in the state."
            )
        weights = [stored(state, f"{slot.name}.weight", slot.weight.shape) for slot in self.slots]
        memory = self.recall(state)
        for slot, weight in zip(self.slots, weights, strict=True):
            slot.host.set_exact_weight(slot.slot, weight.to(slot.weight.device))
        self.tasks_learned = meta["tasks_learned"]
        self.remember(memory)

    # ------------------------------------------------------------------ parts

    def features(self, loader: Iterable[Any], forward: LossFn) -> list[FeatureStatistic]:
        """The second moment of every slot's inputs, over one pass; padding does not count where it is known."""
        with token_mask(self.model) as mask, progress(loader, "features", "batch", shown=self.progress) as batches:
            return feature_statistics(self.model, self.slots, batches, forward, token_mask=mask, peers=processes())

    def each_layer(self, compute: Callable[[int], T], what: str, *inputs: Sequence[Any]) -> list[T]:
        """``compute(i)`` for every slot i, once for those whose entries of all ``inputs`` are the same objects.

        Slots that read one tensor, as q, k and v do, share its statistic.
        """
        known: dict[tuple[int, ...], T] = {}

        def result(i: int) -> T:
            key = tuple(id(column[i]) for column in inputs) or (i,)
            if key not in known:
                known[key] = compute(i)
            return known[key]

        return for_all_layers(self.slots, lambda group: [result(i) for i in group], what, shown=self.progress)

    def attach(self, adapters: Sequence[LoraAdapter | None]) -> None:
        """Freeze the model and put an adapter into every slot that gets one."""
        attach(self.model, self.slots, adapters)

    def merge_adapters(self) -> None:
        """Add every open adapter to its weight."""
        for slot in self.slots:
            if slot.adapter is not None:
                slot.merge()

    def _require(self, function: str, *, task: bool) -> None:
        if self._given_back:
            raise RuntimeError(f"{function}: {self.name} has given its model back by merge(). Make a new one.")
        if task and not self.training_task:
            raise RuntimeError(f"{function}: a task must be open, got none. Call before_task(loader, loss_fn) first.")
        if not task and self.training_task:
            remedy = "Call after_task(loader)."
            which = "previous" if function == "before_task" else "open"
            raise RuntimeError(f"{function}: the {which} task must be closed first. {remedy}")


def warn_of_small_adapters(method: str, slots: Sequence[LoraSlot], ranks: Sequence[int], r: int) -> None:
    """Name the layers whose adapters are smaller than r, or missing; as a warning of whoever called before_task."""
    none = [slot.name for slot, rank in zip(slots, ranks, strict=True) if rank == 0]
    small = [slot.name for slot, rank in zip(slots, ranks, strict=True) if 0 < rank < r]
    for names, what in (
        (none, "have no useful free direction left and do not adapt"),
        (small, f"have fewer than r = {r} useful free directions and use those"),
    ):
        if names:
            shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
            warnings.warn(f"{method}: {len(names)} of {len(slots)} layers {what}: {shown}.", UserWarning, stacklevel=4)


def stored(state: State, name: str, shape: Sequence[int | None]) -> Tensor:
    """The state's tensor ``name``; None in ``shape`` is any size.

    Raises:
        StateError: it is missing or of another shape.
    """
    tensor = state.tensors.get(name)
    fits = (
        tensor is not None
        and tensor.dim() == len(shape)
        and all(want in (None, size) for want, size in zip(shape, tensor.shape, strict=True))
    )
    if tensor is None or not fits:
        got = None if tensor is None else list(tensor.shape)
        raise StateError(f"load_state: {name} must have shape {list(shape)}, got {got}")
    return tensor
