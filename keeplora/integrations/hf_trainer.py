"""KeepLoRA in Hugging Face's Trainer: one call of ``train()`` per task.

It stands here rather than in ``integrations`` because it saves and reads the states of ``methods``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from keeplora.lora import Confinement
from keeplora.methods import KeepLora
from keeplora.methods.method import Method
from keeplora.methods.state import read_state, write_state

__all__ = ["KeepLoraCallback"]

FOLDER = "keeplora"
"""Where in a checkpoint of Trainer's the method's state is."""


class KeepLoraCallback(TrainerCallback):
    """Lets a ``transformers.Trainer`` train the task that a keeper has open, and puts the keeper into its checkpoints.

    The three calls of every loop stay where they are::

        trainer = Trainer(model, args, train_dataset=task, callbacks=[KeepLoraCallback(keeper)])
        loader = trainer.get_train_dataloader()
        keeper.before_task(loader, loss_fn)
        trainer.train()
        keeper.after_task(loader)

    When training begins, the callback checks that a task is open and that Trainer's optimizer holds its parameters.
    With ``train_a`` it keeps A outside of what is protected in every step. Every checkpoint gets a folder ``keeplora``
    with the keeper's state; in a new process :meth:`resume` reads it, before ``train(resume_from_checkpoint=…)`` reads
    the rest. Optimizers that split parameters up (DeepSpeed ZeRO, FSDP) are refused.

    Args:
        keeper: A :class:`keeplora.KeepLora`, or another method, of the model that is trained or of a part of it.

    Raises:
        RuntimeError: ``train()`` begins while no task is open, or with an optimizer made for an earlier task, or goes
            on from a checkpoint that :meth:`resume` has not read.

    Example:
        >>> import tempfile
        >>> from keeplora import KeepLora, KeepLoraConfig
        >>> from torch import nn
        >>> from transformers import Trainer, TrainingArguments
        >>> class Model(nn.Module):  # what Trainer asks for: a forward that returns the loss
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(8, 3)
        ...     def forward(self, x, labels):
        ...         return {"loss": nn.functional.cross_entropy(self.layer(x), labels)}
        >>> _ = torch.manual_seed(0)
        >>> model, data = Model(), [{"x": torch.randn(8), "labels": i % 3} for i in range(48)]
        >>> keeper = KeepLora(model, KeepLoraConfig(r=2, target_modules="all-linear", feature_energy=0.5))
        >>> with tempfile.TemporaryDirectory() as out:
        ...     args = TrainingArguments(out, num_train_epochs=1, report_to="none", disable_tqdm=True, use_cpu=True)
        ...     trainer = Trainer(model, args, train_dataset=data, callbacks=[KeepLoraCallback(keeper)])
        ...     keeper.before_task(trainer.get_train_dataloader(), lambda model, batch: model(**batch)["loss"])
        ...     steps = trainer.train().global_step
        {'train_runtime': ...}
        >>> steps, keeper.after_task(trainer.get_train_dataloader()).leak < 1e-6
        (6, True)
    """

    def __init__(self, keeper: Method):
        self.keeper = keeper
        self._confinement: Confinement | None = None
        self._resumed: int | None = None

    def resume(self, checkpoint: str | os.PathLike[str]) -> None:
        """Bring the keeper and its model to where they were when Trainer saved ``checkpoint``.

        Call it in place of ``before_task``, and ``train(resume_from_checkpoint=checkpoint)`` next. The keeper must be
        around the pretrained model it was first made for.

        Raises:
            StateError: no state in the checkpoint, a damaged one, or one of another model.
        """
        folder = Path(checkpoint)
        state = read_state(folder / FOLDER)
        step = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
        self.keeper.load_state(state)
        self._resumed = step

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **_: Any,
    ) -> None:
        try:
            wanted = self.keeper.trainable_parameters()
        except RuntimeError as error:
            raise RuntimeError(
                "KeepLoraCallback: a task must be open when training begins. Call keeper.before_task(loader, loss_fn) "
                f"before trainer.train(). ({error})"
            ) from error
        resumed, self._resumed = self._resumed, None
        if state.global_step != (resumed or 0):
            raise RuntimeError(
                f"KeepLoraCallback: training must begin where the keeper stands, at step {resumed or 0}, got "
                f"{state.global_step}. Call callback.resume(checkpoint), then "
                "trainer.train(resume_from_checkpoint=checkpoint)."
            )
        assert optimizer is not None
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        missing = sum(parameter not in held for parameter in wanted)
        if missing:
            raise RuntimeError(
                f"KeepLoraCallback: the optimizer must hold the {len(wanted)} parameters of the open task, got "
                f"{len(wanted) - missing} of them. A Trainer keeps the optimizer of its first train(): make a new "
                "Trainer for every task. DeepSpeed and FSDP, which split parameters up, are not supported."
            )
        self._release()
        if isinstance(self.keeper, KeepLora) and self.keeper.config.train_a:
            self._confinement = self.keeper.confine(optimizer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.keeper.after_step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if not checkpoint.is_dir():
            raise RuntimeError(
                f"KeepLoraCallback: Trainer's checkpoint must be at {checkpoint}, got nothing there. Hyperparameter "
                "search, which saves elsewhere, is not supported."
            )
        write_state(checkpoint / FOLDER, self.keeper.state())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._release()

    def _release(self) -> None:
        if self._confinement is not None:
            self._confinement.remove()
            self._confinement = None
