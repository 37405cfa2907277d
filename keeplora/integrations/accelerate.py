"""A method's task under Accelerate, in a training loop of one's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from keeplora._calls import named
from keeplora.distributed import processes
from keeplora.methods.method import Method
from keeplora.methods.state import read_state

from ._task_hooks import TaskHooks, refuse_untrainable
from .fsdp2 import settle_engine

__all__ = ["OneTask", "resume"]

FOLDER = "keeplora"
"""Where in a folder of ``save_state`` the method's state is."""


class OneTask:
    """The task that a method has open, prepared for a loop under Accelerate.

    Make it after ``before_task``, for every task anew: the parameters that are trained are new ones. The loop stays as
    it is, but for one call: [`backward`][] in place of the accelerator's. It adds the method's penalty; forgetting it
    raises, where there is a penalty. ``after_step`` runs after every step the optimizer takes. ``save_state`` puts the
    method's state beside the accelerator's, until another task is made; [`resume`][] reads it.

    Args:
        accelerator: As ever; mixed precision and accumulated gradients are its business.
        method: A task of it is open.
        model: What the loop calls: the method's model, or a module around it whose forward returns the loss.
        optimizer: Over ``method.trainable_parameters()``. ``method.optimizer(lr=…)`` suits every method; another is
            refused where it would break the method's promise.

    Attributes:
        model, optimizer: What ``accelerator.prepare`` made of them.

    Raises:
        ValueError: the method trains nothing (zero-shot), or on all tasks at once (joint), or cannot be trained with
            this optimizer.
        RuntimeError: no task is open, or the optimizer does not hold its parameters.
        TypeError: the model is sharded or offloaded, or the accelerator would shard it: with FSDP2 call
            [`keeplora.integrations.shard`][] before the method is made.

    Examples:
        >>> from keeplora import KeepLora, KeepLoraConfig
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(4)]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> accelerator = Accelerator(cpu=True)
        >>> method = KeepLora(model, KeepLoraConfig(r=2, target_modules="all-linear", feature_energy=0.5))
        >>> method.before_task(data, loss_fn)
        >>> task = OneTask(accelerator, method, model, method.optimizer(lr=1e-3))
        >>> for batch in data:
        ...     with accelerator.accumulate(task.model):
        ...         task.backward(loss_fn(task.model, batch))
        ...         task.optimizer.step()
        ...         task.optimizer.zero_grad()
        >>> method.after_task(data).leak < 1e-6
        True
    """

    model: nn.Module
    optimizer: AcceleratedOptimizer

    @named
    def __init__(self, accelerator: Accelerator, method: Method, model: nn.Module, optimizer: torch.optim.Optimizer):
        refuse_untrainable("OneTask", method, shares=True)
        settle_engine("OneTask", accelerator.state, method, model)
        self.accelerator, self.method = accelerator, method
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self._hooks = TaskHooks(
            "OneTask", method, self.optimizer, "Call task.backward(loss) in place of accelerator.backward(loss)."
        )
        self._hooks.add(accelerator.register_save_state_pre_hook(self._save))

    def backward(self, loss: Tensor, **options: Any) -> None:
        """``accelerator.backward`` of the loss with the method's penalty.

        Where gradients are accumulated, every batch's loss brings its share of the penalty.
        """
        self.accelerator.backward(self._hooks.with_penalty(loss), **options)

    def _save(self, models: Any, weights: Any, folder: str) -> None:
        if self.accelerator.is_main_process or self.method.shared_out:
            self.method.save(Path(folder) / FOLDER)


@named
def resume(method: Method, checkpoint: str | os.PathLike[str]) -> None:
    """Bring a method and its model to where they were when ``accelerator.save_state`` wrote ``checkpoint``.

    In a new process, with the method around the pretrained model: call it in place of ``before_task``, make the
    [`OneTask`][], then let ``accelerator.load_state(checkpoint)`` read the rest.

    Raises:
        StateError: no state in the checkpoint, a damaged one, or one of another model.
    """
    with processes(method.group).together():
        method.load_state(read_state(Path(checkpoint) / FOLDER))
