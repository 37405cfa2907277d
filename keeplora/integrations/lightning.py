"""A method's task in Lightning's Trainer: one call of ``fit()`` per task."""

from __future__ import annotations

from typing import Any

import lightning
from torch import Tensor

from keeplora.methods.method import LossFn, Method
from keeplora.methods.state import State, StateError

from ._task_hooks import TaskHooks, refuse_untrainable

__all__ = ["OneTask"]


class OneTask(lightning.LightningModule):
    """The task that a method has open, for ``lightning.Trainer.fit``.

    It trains with the method's own optimizer, adds the method's penalty to the loss, and calls ``after_step`` after
    every step the optimizer takes. Checkpoints carry the method's state, so that ``fit(…, ckpt_path=…)`` goes on in
    another process, where the method is around the pretrained model and has no task open.

    In a subclass, ``training_step`` returns ``self.with_penalty(loss)``: leaving that out raises, where there is a
    penalty. ``configure_optimizers`` may return another optimizer over ``self.method.trainable_parameters()``, alone or
    with a schedule; one that would break the method's promise is refused when training begins. Overrides of
    ``on_train_start``, ``on_train_end``, ``on_save_checkpoint`` and ``on_load_checkpoint`` must call ``super()``.

    Args:
        method: A task of it is open when training begins.
        loss_fn: ``loss_fn(model, batch) -> scalar``, called with the method's model.
        options: Of ``method.optimizer``: lr, weight_decay, ….

    Attributes:
        method, loss_fn: As given. model: The method's.

    Raises:
        ValueError: the method trains nothing (zero-shot), or on all tasks at once (joint); in ``fit``, it cannot be
            trained with this optimizer.
        RuntimeError: in ``fit``: no task is open, or the optimizer does not hold its parameters, or checkpoints are
            asked for of a method that cannot be saved in an open task.

    Examples:
        >>> import torch
        >>> from keeplora import KeepLora, KeepLoraConfig
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = [(torch.randn(8), torch.tensor(i % 3)) for i in range(64)]
        >>> loader = torch.utils.data.DataLoader(data, batch_size=16)
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> method = KeepLora(model, KeepLoraConfig(r=2, target_modules="all-linear", feature_energy=0.5))
        >>> method.before_task(loader, loss_fn)
        >>> trainer = lightning.Trainer(
        ...     max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(OneTask(method, loss_fn, lr=1e-3), loader)
        >>> method.after_task(loader).leak < 1e-6
        True
    """

    def __init__(self, method: Method, loss_fn: LossFn, **options: Any):
        refuse_untrainable("OneTask", method)
        super().__init__()
        self.method, self.model, self.loss_fn = method, method.model, loss_fn
        self._options = options
        self._hooks: TaskHooks | None = None

    def with_penalty(self, loss: Tensor) -> Tensor:
        """The loss plus the method's penalty: what ``training_step`` returns."""
        assert self._hooks is not None
        return self._hooks.with_penalty(loss)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """``loss_fn(model, batch)`` plus the penalty."""
        return self.with_penalty(self.loss_fn(self.model, batch))

    def configure_optimizers(self) -> Any:
        """The method's own optimizer with the options given."""
        return self.method.optimizer(**self._options)

    def on_train_start(self) -> None:
        """Refuse an optimizer that would break the promise of the method, or make it keep it."""
        optimizers = self.trainer.optimizers
        if len(optimizers) != 1:
            raise ValueError(f"OneTask: configure_optimizers must return one optimizer, got {len(optimizers)}.")
        remedy = "Return self.with_penalty(loss) from training_step."
        self._hooks = TaskHooks("OneTask", self.method, optimizers[0], remedy)

    def on_train_end(self) -> None:
        """Take the hooks away."""
        if self._hooks is not None:
            self._hooks.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the method's state into Lightning's checkpoint."""
        state = self.method.state()
        checkpoint["keeplora"] = {"tensors": state.tensors, "meta": state.meta}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before Lightning fills the model, which is when the adapters have to be there."""
        saved = checkpoint.get("keeplora")
        if not isinstance(saved, dict) or set(saved) != {"tensors", "meta"}:
            raise StateError(
                "on_load_checkpoint: the checkpoint must hold the method's state, got one without it. Give one that "
                "was saved while a OneTask was trained."
            )
        self.method.load_state(State(**saved))
