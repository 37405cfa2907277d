"""What is saved of every method, and how it is gone on with: checked first, changed last."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import nn
from typing_extensions import Self

from keeplora._calls import public
from keeplora._version import __version__
from keeplora.distributed import Group, processes
from keeplora.lora import LoraHost, Target, TokenMask, require_whole, unwrap
from keeplora.lora.shares import is_shared_out
from keeplora.math.digest import digest

from .settings import plain
from .state import State, StateError, read_state, write_state

__all__ = ["Saved", "made", "resumed"]

S = TypeVar("S", bound="Saved")
UNREADABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)
"""What values that nobody expected break when they are read."""
MOST_TASKS = 2**20
"""More than anybody learns; a number of tasks seeds generators."""


class Saved(ABC):
    """The part of [`Method`][] that saves it, at any moment of a task's life, and loads it.

    A method gives [`weights_state`][], [`recall_weights`][] and [`set_weights`][] for what has changed in the
    model, and [`memory_state`][], [`recall`][] and [`remember`][] for the rest.
    """

    name: ClassVar[str]
    config_type: ClassVar[type]
    trains: ClassVar[bool] = True
    """False for methods that never take an optimizer step (zero-shot)."""
    trains_weights: ClassVar[bool] = False
    """Whether an optimizer holds the model's own weights, and not adapters."""

    model: nn.Module
    config: Any
    token_mask: TokenMask | None = None
    tasks_learned: int = 0
    training_task: bool = False
    shared_out: bool = False  # whether FSDP2 has cut the model into rows
    group: Group | None = None
    _flags: dict[nn.Parameter, bool]  # requires_grad as it was before the method was made,
    _flags_before: dict[nn.Parameter, bool]  # and before the open task

    @abstractmethod
    def __init__(
        self,
        model: nn.Module,
        config: Any = None,
        *,
        targets: Sequence[Target] | None = None,
        progress: bool | None = None,
    ):
        """As every method is made."""

    @abstractmethod
    def weights_state(self) -> State:
        """What of the model has changed, or may: tensors by name, and JSON values."""

    @abstractmethod
    def recall_weights(self, state: State) -> Any:
        """What [`weights_state`][] gave, checked and ready for [`set_weights`][]; nothing is changed here.

        Raises:
            StateError: it does not fit.
        """

    @abstractmethod
    def set_weights(self, weights: Any, *, open_task: bool) -> None:
        """Go on with what [`recall_weights`][] returned; where a task is open, ready to be trained on."""

    def whole_weights_state(self) -> State:
        """[`weights_state`][] of a copy in memory, which may be gone back to from anywhere."""
        return self.weights_state()

    def memory_state(self) -> State:
        """What is remembered between tasks: tensors by name, and JSON values."""
        return State()

    def recall(self, state: State) -> Any:  # noqa: B027 (most remember nothing)
        """The memory in ``state``, checked and ready for [`remember`][]; [`StateError`][] where it does not fit.

        Nothing is changed here.
        """

    def remember(self, memory: Any) -> None:  # noqa: B027
        """Go on with a memory from [`recall`][]. Called before [`set_weights`][]."""

    @public
    def state(self) -> State:
        """What [`load_state`][] needs to continue, changed weights and an open task included; a copy on the CPU."""
        state = self._live_state("state", whole=True)
        copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.tensors.items()}
        return State(copies, state.meta, state.lasting)

    def live_state(self) -> State:
        """What [`save`][] writes: [`state`][] of the tensors themselves, not of copies, to be written at once."""
        return self._live_state("state")

    def _live_state(self, function: str, *, whole: bool = False) -> State:
        """The state, of the tensors themselves; ``whole`` for a copy in memory."""
        self._require(function, task=None)
        self._settle_buffers(function)
        weights, memory = self.whole_weights_state() if whole else self.weights_state(), self.memory_state()
        meta = {
            "method": self.name,
            "config": plain(self.config),
            "tasks_learned": self.tasks_learned,
            "training_task": self.training_task,
            "versions": {"keeplora": __version__, "torch": str(torch.__version__)},
            **weights.meta,
            **memory.meta,
        }
        return State(weights.tensors | memory.tensors, meta, weights.lasting | memory.lasting)

    def digest(self) -> str:
        """A hash of all that decides what the model computes: its weights and buffers, and the method's state.

        Every value counts, as in ``digest.digest``; two models of one kind with one hash give the same outputs.
        """
        state = self._live_state("digest")
        held = {
            **{f"weight {name}": weight for name, weight in self.model.named_parameters()},
            **{f"buffer {name}": buffer for name, buffer in self.model.named_buffers()},
            **{f"state {name}": state.tensors[name] for name in sorted(state.tensors)},
        }
        meta = json.dumps(state.meta, sort_keys=True)
        return hashlib.sha256(f"{digest(held.items())}\n{meta}".encode()).hexdigest()

    @public
    def load_state(self, state: State) -> None:
        """Continue from [`state`][], on a model with the pretrained weights. All is checked before anything changes.

        A task that is open here is abandoned. One that was open there is open again: make its optimizer anew.

        Raises:
            StateError: the state belongs to another method, another model or other targets, or is incomplete.
        """
        if not isinstance(state, State):
            raise TypeError(
                f"load_state: state must be what state() gave, got {type(state).__name__}. Folders are read by load."
            )
        self._require("load_state", task=None)
        self._settle_buffers("load_state")
        self._continue(self._checked(state))

    def _checked(self, state: State) -> _Checked:
        """``state``, which fits; nothing is changed.

        A state may come from anywhere: whatever its values break while they are read is said as a StateError.
        """
        try:
            return self._read(state)
        except StateError:
            raise
        except UNREADABLE as error:
            raise StateError(
                f"load_state: state must be one of {self.name!r} for this model, got one that cannot be read: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _read(self, state: State) -> _Checked:
        tensors, meta = Reading(state.tensors), Reading(state.meta)
        check_method(self.name, state)
        tasks, training = meta.get("tasks_learned"), meta.get("training_task")
        if isinstance(tasks, bool) or not isinstance(tasks, int) or not 0 <= tasks < MOST_TASKS:
            raise StateError(f"load_state: tasks_learned must be a number of tasks below {MOST_TASKS}, got {tasks!r}")
        if not isinstance(training, bool):
            raise StateError(f"load_state: training_task must be true or false, got {training!r}")
        recorded = State(tensors, meta)
        checked = _Checked(tasks, training, self.recall_weights(recorded), self.recall(recorded))
        tensors.require_all_read("tensors", self.name)
        meta.require_all_read("meta", self.name, besides=("method", "config", "versions"))
        meta.require_all_there("meta", self.name)
        return checked

    def _continue(self, checked: _Checked) -> None:
        if self.training_task:
            self.abandon_task()
        tasks, training, weights, memory = checked
        self._flags_before = dict.fromkeys(self._flags, False) if tasks and self.trains else self._flags
        for parameter, flag in self._flags_before.items():
            parameter.requires_grad_(flag)
        self.tasks_learned, self.training_task = tasks, training
        self.remember(memory)
        self.set_weights(weights, open_task=training)
        if training:
            self._hold_buffers("load_state")

    @public
    def save(self, path: str | os.PathLike[str], *, store: str | os.PathLike[str] | None = None) -> None:
        """Write the state to a folder: safetensors and JSON, atomically, without pickle.

        What an earlier save of this process, or the load, has on disk is not written again. Several processes may save
        into one folder: they take turns, and the last one's state stays. Where FSDP2 has shared the model out all of
        its processes call this, and the first one writes: a state that any number of them can load.

        Args:
            store: A folder that several states share files in, by hard links: ``state.write_state``.

        Raises:
            OSError: the folder cannot be written to, or another process does not get through. What was there stays.
        """
        if not self.shared_out:
            write_state(path, self._live_state("save"), store=store)
            return
        with processes(self.group).together():  # all know parts of it, one writes
            state = self._live_state("save")
            if not processes().rank:
                write_state(path, state, store=store)

    @classmethod
    @public
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        targets: Sequence[Target] | None = None,
        token_mask: TokenMask | None = None,
        progress: bool | None = None,
        group: Group | None = None,
    ) -> Self:
        """The method as [`save`][] found it, around the pretrained ``model`` it was made with.

        Args:
            group: The processes that share its tasks, as of ``before_task``. All of them call this where FSDP2 has
                shared the model out to them.

        Raises:
            StateError: nothing there, damaged, of another version, or made with another model.
        """
        shares = "load" in vars(cls).get("on_shares", ())
        require_whole("load", model, shares=shares)
        with processes(group).together() if shares and is_shared_out(model) else nullcontext():
            state = read_state(path)
            check_method(cls.name, state, f"load: {os.fspath(path)}")
            method = resumed(made(cls, cls.config_type, state, path, model, targets=targets, progress=progress), state)
        method.token_mask, method.group = token_mask, group
        return method

    @abstractmethod
    def abandon_task(self) -> None:
        """Close the open task as if it had never been."""

    @abstractmethod
    def _settle_buffers(self, function: str) -> None:
        """Put frozen buffers back that something has moved all the same, and name them."""

    @abstractmethod
    def _hold_buffers(self, function: str) -> None:
        """Keep the model's buffers as they are while the task is open."""

    @abstractmethod
    def release(self) -> None:
        """Put the model's ordinary layers back."""

    @abstractmethod
    def _require(self, function: str, *, task: bool | None) -> None:
        """Refuse a call at the wrong time."""


class Reading(dict[str, Any]):
    """Part of a state, and which of its entries have been asked for: what nobody asks for belongs to something else."""

    def __init__(self, entries: Mapping[str, Any]):
        super().__init__(entries)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The entry, remembered as one that must be there."""
        self.names.add(name)
        return super().get(name, default)

    def require_all_there(self, part: str, method: str) -> None:
        """Refuse if an entry that was asked for is missing: none is not null."""
        if missing := sorted(self.names - set(self)):
            raise StateError(
                f"load_state: {part} must be those of {method!r} at this point of its life, got {len(missing)} less "
                f"(first: {missing[0]})"
            )

    def require_all_read(self, part: str, method: str, besides: Sequence[str] = ()) -> None:
        """Refuse entries that were not asked for."""
        if strangers := sorted(set(self) - self.names - set(besides)):
            raise StateError(
                f"load_state: {part} must be those of {method!r} at this point of its life, got {len(strangers)} more "
                f"(first: {strangers[0]})"
            )


class _Checked(NamedTuple):
    """A state that fits, ready to be gone on from."""

    tasks: int
    training: bool
    weights: Any
    memory: Any


def resumed(method: S, state: State) -> S:
    """``method``, fresh around its model, with ``state``; on an error the model has its ordinary layers again."""
    try:
        method.load_state(state)
    except Exception:
        method.release()
        raise
    return method


def check_method(name: str, state: State, where: str = "load_state: state") -> None:
    """Refuse a state of another method."""
    if state.meta.get("method") != name:
        raise StateError(f"{where} must be of method {name!r}, got {state.meta.get('method')!r}")


def made(
    build: Callable[..., S],
    config_type: type,
    state: State,
    path: str | os.PathLike[str],
    model: nn.Module,
    **options: Any,
) -> S:
    """The method with the settings that ``state`` was saved with, fresh around ``model``; errors leave that alone."""
    settings = saved_settings(state, path)
    config = _config(config_type, settings, path)
    held = any(isinstance(module, LoraHost) for module in model.modules())
    hooks = [(kind, set(kind)) for module in model.modules() for kind in _hooks(module)]
    try:
        return build(model, config, **options)
    except UNREADABLE as error:
        if held:  # by another method, which is not the state's fault
            raise
        for kind, known in hooks:
            for key in set(kind) - known:
                del kind[key]
        unwrap(model)
        raise StateError(f"load: {os.fspath(path)} must fit the model it is loaded into: {error}") from error


def _config(config_type: type, settings: dict[str, Any], path: str | os.PathLike[str]) -> Any:
    """The settings as they were: every one of them, none of which a default or a conversion stands for."""
    try:
        config = config_type(**settings)
    except UNREADABLE as error:
        raise StateError(f"load: {os.fspath(path)} must hold settings of {config_type.__name__}: {error}") from error
    again = plain(config)
    if again != settings:
        name = next(n for n in sorted({*again, *settings}) if n not in settings or again.get(n, ...) != settings[n])
        got = f"{settings[name]!r}" if name in settings else "none"
        raise StateError(
            f"load: {os.fspath(path)} must hold every setting of {config_type.__name__} as it was, got {got} [{name}]. "
            "Save the state again with the version that made it."
        )
    return config


def _hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_hooks, module._forward_pre_hooks


def saved_settings(state: State, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of the method that was saved."""
    settings = state.meta.get("config")
    if not isinstance(settings, dict):
        raise StateError(f"load: {os.fspath(path)} must hold the method's settings, got {settings!r}")
    return settings
