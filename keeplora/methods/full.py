"""Full fine-tuning, task after task, and joint training on all tasks so far: what the others are held against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from keeplora._calls import public
from keeplora.families import find_targets
from keeplora.lora import Target, wrap

from .flags import freeze
from .method import LossFn, Method
from .reading import stored_like
from .state import State
from .zero_shot import NoConfig

__all__ = ["FullFineTuning", "JointTraining"]


class FullFineTuning(Method):
    """Every parameter is trained, one task after the other.

    The layers are replaced as for the other methods, without adapters, so that all run the same attention code. While a
    task is open, a copy of the model as it was is kept on the CPU, for ``abandon_task``.
    """

    name: ClassVar[str] = "full"
    config_type: ClassVar[type] = NoConfig
    freezes = False
    trains_weights = True

    @public
    def __init__(
        self,
        model: nn.Module,
        config: NoConfig | None = None,
        *,
        targets: Sequence[Target] | None = None,
        progress: bool | None = None,
    ):
        super().__init__(model, config, targets=targets, progress=progress)
        wrap(model, find_targets(model))
        self._before: dict[str, Tensor] = {}

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        self._before = {name: tensor.to("cpu", copy=True) for name, tensor in self.model.state_dict().items()}
        self.model.requires_grad_(True)

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        self._before = {}
        freeze(self.model)

    def drop_task(self) -> None:
        self.model.load_state_dict(self._before)
        self._before = {}

    def named_trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def weights_state(self) -> State:
        """The whole model, and in an open task the model it began with."""
        before = {f"before.{name}": tensor for name, tensor in self._before.items()}
        return State({f"model.{name}": tensor for name, tensor in self.model.state_dict().items()} | before)

    def recall_weights(self, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        own = self.model.state_dict()
        held: list[dict[str, Tensor]] = []
        for kind in ("model", "before") if state.meta["training_task"] else ("model",):
            held.append({name: stored_like(state, f"{kind}.{name}", tensor) for name, tensor in own.items()})
        return held[0], held[1] if len(held) > 1 else {}

    def set_weights(self, weights: tuple[dict[str, Tensor], dict[str, Tensor]], *, open_task: bool) -> None:
        now, self._before = weights
        self.model.load_state_dict(now)
        if open_task:
            self.model.requires_grad_(True)


class JointTraining(FullFineTuning):
    """The upper bound: every parameter is trained, on the data of all tasks so far at once.

    Task i goes on from the model of task i − 1, with the steps of i + 1 tasks on their shuffled batches. No continual
    learner may look at earlier data again: what it misses of this is its price.
    """

    name: ClassVar[str] = "joint"
    joint = True
