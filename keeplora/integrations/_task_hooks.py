"""What a method asks of a training loop besides its gradients, hung on the loop's optimizer; for every loop here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from keeplora.lora import require_whole
from keeplora.lora.optimizer import unwrapped
from keeplora.lora.shares import is_dtensor
from keeplora.methods.method import Method

__all__ = ["TaskHooks", "refuse_untrainable"]


class _Removable(Protocol):
    def remove(self) -> None: ...


_HANDLES: WeakKeyDictionary[Method, list[_Removable]] = WeakKeyDictionary()
"""The hooks of each method's open task. A loop that ends with an error leaves them; the next one takes them away."""


def refuse_untrainable(caller: str, method: Method, *, shares: bool = False) -> None:
    """Refuse a method that no loop over one task's data can train, or whose weights an engine has taken away.

    Args:
        shares: Whether the loop can train what FSDP2 has shared out.

    Raises:
        ValueError: it never trains, or it trains on the data of all tasks.
        TypeError: its model is sharded or offloaded (``keeplora.lora.engines``).
    """
    if not isinstance(method, Method):
        raise TypeError(
            f"{caller}: method must be one of keeplora's, got {type(method).__name__}. "
            "Make one around the model: keeplora.KeepLora(model)."
        )
    require_whole(caller, method.model, shares=shares and method.shared_out)
    if not method.trains:
        raise ValueError(
            f"{caller}: method must be one that trains, got {method.name!r}, which has no parameters to train. "
            "Evaluate method.model as it is."
        )
    if method.joint:
        raise ValueError(
            f"{caller}: method must learn from the data of one task, got {method.name!r}, which takes that of "
            "all tasks so far. Train 'full' on a ConcatDataset of all tasks."
        )


class TaskHooks:
    """Lets a loop honour what a method asks for while a task is open.

    The method's ``adopt`` gets the optimizer. Its ``after_step`` runs after every step that the optimizer takes: not
    after one that a GradScaler skips. A step without the method's penalty raises. One such set of hooks exists per
    method: a new one takes the last one's place.

    Args:
        caller: The name in error messages, of what the user called.
        method: A task of it is open.
        optimizer: Over the task's parameters; may be wrapped by Accelerate or Lightning.
        remedy: How the user adds the penalty.

    Raises:
        RuntimeError: no task is open, or the optimizer does not hold its parameters.
        TypeError: FSDP2 has cut the adapters up.
        ValueError: the method cannot be trained by a loop like this, or not with this optimizer.
    """

    def __init__(self, caller: str, method: Method, optimizer: Any, remedy: str):
        refuse_untrainable(caller, method, shares=True)
        self.caller, self.method, self.remedy = caller, method, remedy
        self._scaler = getattr(optimizer, "scaler", None)  # Accelerate's, in fp16
        self._penalty_added = False
        wanted = self._require_parameters(optimizer)
        self._device = wanted[0].device.type if wanted else "cpu"
        for handle in _HANDLES.pop(method, ()):
            handle.remove()
        self._handles = _HANDLES[method] = []
        adopted = method.adopt(optimizer)
        if adopted is not None:
            self._handles.append(adopted)
        self._handles.append(unwrapped(optimizer).register_step_post_hook(self._after_step))

    def add(self, handle: _Removable) -> None:
        """Take this handle away with the others."""
        self._handles.append(handle)

    def close(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()

    def with_penalty(self, loss: Tensor) -> Tensor:
        """``loss`` plus the method's penalty."""
        penalty = self._penalty()
        return loss if penalty is None else loss + penalty.to(loss.device)

    def add_penalty_gradient(self) -> None:
        """Add the penalty's gradient to ``.grad`` of the task's parameters, as if it had been in the loss.

        For loops that keep the loss to themselves. Call it once per optimizer step, after the gradients of the last
        step are gone and before gradients are clipped. Hooks on gradients that are yet to come (those of
        DistributedDataParallel) do not run; they find the penalty's share in ``.grad``.
        """
        parameters: Sequence[Tensor] = self.method.trainable_parameters()
        with torch.enable_grad(), saved_tensors_hooks(_itself, _itself):  # a checkpoint around us must not count ours
            penalty = self._penalty()
            if penalty is None or not penalty.requires_grad:
                return
            if self._scaler is not None:
                penalty = self._scaler.scale(penalty)
            gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)

    def _penalty(self) -> Tensor | None:
        """Outside of the loop's autocast: a penalty is a small sum that bfloat16 would round away."""
        self._penalty_added = True
        with torch.autocast(self._device, enabled=False):
            return self.method.penalty()

    def _after_step(self, *_: Any) -> None:
        added, self._penalty_added = self._penalty_added, False
        if not added and self.method.penalty() is not None:
            raise RuntimeError(
                f"{self.caller}: the penalty of {self.method.name!r} must be added before every optimizer step, got a "
                f"step without it. {self.remedy}"
            )
        self.method.after_step()

    def _require_parameters(self, optimizer: Any) -> Sequence[Tensor]:
        try:
            wanted = self.method.trainable_parameters()
        except RuntimeError as error:
            raise RuntimeError(f"{self.caller}: a task must be open when training begins ({error})") from error
        if not self.method.trains_weights and any(map(is_dtensor, wanted)):
            raise TypeError(
                f"{self.caller}: adapters must be outside of FSDP2, got some that it cut into rows with the model. "
                "Shard the model before the method is made: keeplora.integrations.shard(accelerator, model)."
            )
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        missing = sum(parameter not in held for parameter in wanted)
        if missing:
            raise RuntimeError(
                f"{self.caller}: the optimizer must hold the {len(wanted)} parameters of the open task, got "
                f"{len(wanted) - missing} of them. Make a new optimizer for every task, after before_task (a Trainer "
                "keeps that of its first train(): make a new Trainer). DeepSpeed, which splits parameters up, is not "
                "supported."
            )
        return wanted


def _itself(tensor: Tensor) -> Tensor:
    return tensor
