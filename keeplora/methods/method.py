"""The protocol every continual-learning method keeps, so that one training loop serves them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.lora import Confinement, unwrap

from .capacity import Capacity
from .state import State, StateError

LossFn = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(model, batch) -> scalar``: the mean loss of one batch; runs every tower that is adapted."""


def require_loss_fn(loss_fn: object) -> None:
    """Refuse what is no function, before anything changes; the two arguments of before_task are easily swapped."""
    if not callable(loss_fn):
        raise TypeError(
            f"before_task: loss_fn must be a function of (model, batch), got {type(loss_fn).__name__}. "
            "Call before_task(loader, loss_fn)."
        )


class Method(ABC):
    """One way to learn a sequence of tasks.

    The life of a task: :meth:`before_task`, then any number of optimizer steps on
    :meth:`trainable_parameters` (add :meth:`penalty` to the loss, call :meth:`after_step` after each step),
    then :meth:`after_task`. Between tasks the model is ready for evaluation.

    A method changes nothing but ``self.model`` and itself, and ``self.model`` stays the object it was given.
    """

    name: ClassVar[str]
    trains: ClassVar[bool] = True
    """False for methods that never take an optimizer step (zero-shot)."""
    joint: bool = False
    """True for upper bounds that train on the data of all tasks so far, not on the present one's alone."""
    merges: bool = True
    """Whether all that was learned is in the model's own weights after each task, so that inference costs nothing."""

    model: nn.Module

    progress: bool | None = None
    """Whether passes over data and layers draw bars on stderr; None: if that is a terminal."""

    validate: Callable[[], float] | None = None
    """``validate() -> score`` of the model as it is, higher is better, on held-out data of the tasks so far.

    Set by the training loop before :meth:`before_task`, for methods that choose something in :meth:`after_task`.
    """

    @abstractmethod
    def before_task(self, loader: Iterable[Any], loss_fn: LossFn) -> Any:
        """Prepare for a task. ``loader`` yields its training batches and is iterated once, or not at all."""

    @abstractmethod
    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters an optimizer should hold for the task that is open. Valid after :meth:`before_task`."""

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        """An AdamW over :meth:`trainable_parameters` with these options: what the method is best trained with."""
        return torch.optim.AdamW(self.trainable_parameters(), **options)

    def adopt(self, optimizer: torch.optim.Optimizer) -> Confinement | None:
        """Make an optimizer of somebody else's keep the method's promise, or refuse it.

        Args:
            optimizer: One over :meth:`trainable_parameters`, or a wrapper that holds one as ``optimizer``.

        Returns:
            A handle with ``remove()`` where something was hung on the optimizer, else None.

        Raises:
            ValueError: training with it would break what the method promises.
        """
        return None

    def penalty(self) -> Tensor | None:
        """A term to add to the loss of the current step, or None."""
        return None

    def after_step(self) -> None:  # noqa: B027 (most methods have nothing to do)
        """Called after every optimizer step."""

    @abstractmethod
    def after_task(self, loader: Iterable[Any], loss_fn: LossFn | None = None) -> Any:
        """Close the task; what it returns is reported (a retention certificate, or None)."""

    def capacity(self) -> Capacity | None:
        """The room that is left for more tasks, of methods that protect a subspace."""
        return None

    def merge(self) -> nn.Module:
        """Give the model back with its ordinary layers, all that was learned in its weights; returns ``model``.

        The method cannot be used afterwards.

        Raises:
            RuntimeError: a task is open, or the method computes what ordinary layers cannot (:attr:`merges`).
        """
        if not self.merges:
            raise RuntimeError(
                f"merge: what {self.name!r} learned must fit into the model's weights, and does not: it computes more "
                "than the pretrained model in every forward. Keep using method.model."
            )
        return unwrap(self.model)

    @abstractmethod
    def state(self) -> State:
        """What :meth:`load_state` needs to continue, the model's changed weights included."""

    @abstractmethod
    def load_state(self, state: State) -> None:
        """Continue from :meth:`state`, on a model as it was before the first task."""


def parameter_state(model: nn.Module) -> dict[str, Tensor]:
    """A detached CPU copy of every entry of ``model.state_dict()``."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def freeze(model: nn.Module) -> None:
    """Switch every parameter's gradient off."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def check_method(method: Method, state: State) -> None:
    """Refuse a state of another method."""
    if state.meta.get("method") != method.name:
        raise StateError(f"load_state: state must be of method {method.name!r}, got {state.meta.get('method')!r}")
