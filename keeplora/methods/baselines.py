"""The baselines every method is held against: zero-shot, full fine-tuning, joint training, sequential LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.integrations import find_targets
from keeplora.lora import LoraAdapter, wrap

from .adapted import AdaptedMethod, AdapterConfig, check_range
from .base import LossFn, Method, State, freeze, parameter_state
from .state import StateError

__all__ = ["FullFineTuning", "JointTraining", "LoraConfig", "NoConfig", "SequentialLora", "ZeroShot"]


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
        mine = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        wrong = [name for name in {**mine, **state.tensors} if mine.get(name) != _shape(state, name)]
        if wrong:
            raise StateError(
                f"load_state: state must have the tensors of this model, got {len(wrong)} others (first: {wrong[0]})"
            )
        self.model.load_state_dict(state.tensors)


class JointTraining(FullFineTuning):
    """The upper bound: every parameter is trained, on the data of all tasks so far at once.

    Task i goes on from the model of task i − 1, with the steps of i + 1 tasks on their shuffled batches. No continual
    learner may look at earlier data again: what it misses of this is its price.
    """

    name: ClassVar[str] = "joint"
    joint = True


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """Settings of :class:`SequentialLora`: those of every adapter, dropout of its inputs, and the seed of A."""

    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "dropout", 0.0, 1.0, closed=False)


class SequentialLora(AdaptedMethod):
    r"""Plain LoRA on one task after the other: a new adapter per task, merged after it.

    .. math:: y = x W^\top + \tfrac{\alpha}{r}\,(x A^\top) B^\top

    A starts Kaiming-uniform, B at zero; both are trained (Hu et al. 2022, arXiv:2106.09685; PEFT's defaults).
    """

    name: ClassVar[str] = "lora"
    config: LoraConfig

    def __init__(self, model: nn.Module, config: LoraConfig | None = None, **options: Any):
        self.config = config or LoraConfig()
        super().__init__(model, self.config, **options)

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        self.attach(self.fresh_adapters())

    def fresh_adapters(self) -> list[LoraAdapter]:
        """An untrained adapter for every slot: its numbers follow from the seed and the number of tasks learned."""
        generator = torch.Generator().manual_seed(self.config.seed * 1009 + self.tasks_learned)
        adapters = []
        for slot in self.slots:
            out, width = slot.weight.shape
            a = torch.empty(self.config.r, width)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            adapters.append(self.adapter(a, torch.zeros(out, self.config.r)))
        return adapters

    def adapter(self, a: Tensor, b: Tensor) -> LoraAdapter:
        config = self.config
        return LoraAdapter(a, b, config.scaling, train_a=True, dropout=config.dropout)

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        self.merge_adapters()


def _check_method(method: Method, state: State) -> None:
    if state.meta.get("method") != method.name:
        raise StateError(f"load_state: state must be of method {method.name!r}, got {state.meta.get('method')!r}")


def _shape(state: State, name: str) -> torch.Size | None:
    return state.tensors[name].shape if name in state.tensors else None
