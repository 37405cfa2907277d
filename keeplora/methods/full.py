"""Full fine-tuning, task after task, and joint training on all tasks so far: what the others are held against."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from keeplora.families import find_targets
from keeplora.lora import wrap

from .method import LossFn, Method, check_method, freeze, parameter_state
from .state import State, StateError
from .zero_shot import NoConfig

__all__ = ["FullFineTuning", "JointTraining"]


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
        check_method(self, state)
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


def _shape(state: State, name: str) -> torch.Size | None:
    return state.tensors[name].shape if name in state.tensors else None
