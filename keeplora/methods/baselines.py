"""The baselines every method is held against: zero-shot, full fine-tuning, sequential LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from keeplora.integrations import find_targets
from keeplora.lora import LoraAdapter, LoraSlot, select_targets, wrap

from .base import LossFn, Method, State, freeze, parameter_state
from .state import StateError

__all__ = ["FullFineTuning", "LoraConfig", "NoConfig", "SequentialLora", "ZeroShot"]


@dataclass(frozen=True)
class NoConfig:
    """No settings."""


class ZeroShot(Method):
    """The pretrained model, never trained."""

    name: ClassVar[str] = "zero-shot"
    trains: ClassVar[bool] = False

    def __init__(self, model: nn.Module, config: NoConfig | None = None):
        self.model = model
        self.config = config or NoConfig()

    def before_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        """Nothing to prepare."""

    def trainable_parameters(self) -> list[nn.Parameter]:
        return []

    def after_task(self, loader: Iterable[Any], loss_fn: LossFn | None = None) -> None:
        """Nothing to close."""

    def state(self) -> State:
        return State({}, {"method": self.name})

    def load_state(self, state: State) -> None:
        _check_method(self, state)


class FullFineTuning(Method):
    """Every parameter is trained, one task after the other.

    The layers are replaced as for the other methods, without adapters, so that all run the same attention code.
    """

    name: ClassVar[str] = "full"

    def __init__(self, model: nn.Module, config: NoConfig | None = None):
        self.model = model
        self.config = config or NoConfig()
        wrap(model, find_targets(model))

    def before_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def after_task(self, loader: Iterable[Any], loss_fn: LossFn | None = None) -> None:
        freeze(self.model)

    def state(self) -> State:
        return State(parameter_state(self.model), {"method": self.name})

    def load_state(self, state: State) -> None:
        _check_method(self, state)
        self.model.load_state_dict(state.tensors)


@dataclass(frozen=True)
class LoraConfig:
    """Settings of :class:`SequentialLora`: rank, ``alpha / r`` scaling (``alpha / sqrt(r)`` with rslora), layers."""

    r: int = 16
    alpha: float = 16.0
    rslora: bool = False
    target_modules: tuple[str, ...] | str = ("attn",)
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r <= 0:
            raise ValueError(f"LoraConfig: r must be an int of at least 1, got {self.r!r}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"LoraConfig: alpha must be a positive number, got {self.alpha!r}")
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class SequentialLora(Method):
    r"""Plain LoRA on one task after the other: a new adapter per task, merged after it.

    .. math:: y = x W^\top + \tfrac{\alpha}{r}\,(x A^\top) B^\top

    A starts Kaiming-uniform, B at zero; both are trained (Hu et al. 2022, arXiv:2106.09685; PEFT's defaults).
    """

    name: ClassVar[str] = "lora"

    def __init__(self, model: nn.Module, config: LoraConfig | None = None):
        self.model = model
        self.config = config or LoraConfig()
        targets = find_targets(model)
        chosen = {target.name for target in select_targets(targets, self.config.target_modules)}
        self.slots: list[LoraSlot] = [slot for slot in wrap(model, targets) if slot.name in chosen]
        self.tasks_learned = 0

    def before_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        if any(slot.adapter is not None for slot in self.slots):
            raise RuntimeError("before_task: the previous task must be closed first. Call after_task(loader).")
        generator = torch.Generator().manual_seed(self.config.seed * 1009 + self.tasks_learned)
        freeze(self.model)
        for slot in self.slots:
            out, width = slot.weight.shape
            if self.config.r > min(out, width):
                raise ValueError(
                    f"before_task: r must be at most {min(out, width)}, got {self.config.r} [{slot.name}]. Lower r."
                )
        for slot in self.slots:
            out, width = slot.weight.shape
            a = torch.empty(self.config.r, width)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            slot.attach(LoraAdapter(a, torch.zeros(out, self.config.r), self.config.scaling, train_a=True))

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for slot in self.slots if slot.adapter is not None for p in (slot.adapter.A, slot.adapter.B)]

    def after_task(self, loader: Iterable[Any], loss_fn: LossFn | None = None) -> None:
        for slot in self.slots:
            slot.check_finite("after_task")
        if any(slot.adapter is None for slot in self.slots):
            raise RuntimeError("after_task: a task must be open, got none. Call before_task(loader, loss_fn) first.")
        for slot in self.slots:
            slot.merge()
        self.tasks_learned += 1

    def state(self) -> State:
        if any(slot.adapter is not None for slot in self.slots):
            raise RuntimeError("state: the open task must be closed first. Call after_task(loader).")
        tensors = {f"{slot.name}.weight": slot.exact_weight.detach().cpu().clone() for slot in self.slots}
        return State(tensors, {"method": self.name, "tasks_learned": self.tasks_learned})

    def load_state(self, state: State) -> None:
        _check_method(self, state)
        if set(state.tensors) != {f"{slot.name}.weight" for slot in self.slots}:
            raise StateError("load_state: state must have the targets of this model, got others")
        for slot in self.slots:
            slot.host.set_exact_weight(slot.slot, state.tensors[f"{slot.name}.weight"].to(slot.weight.device))
        self.tasks_learned = state.meta["tasks_learned"]


def _check_method(method: Method, state: State) -> None:
    if state.meta.get("method") != method.name:
        raise StateError(f"load_state: state must be of method {method.name!r}, got {state.meta.get('method')!r}")
