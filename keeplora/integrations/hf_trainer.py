"""A method's task in Hugging Face's Trainer: one call of ``train()`` per task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from keeplora._calls import named
from keeplora._messages import warn
from keeplora._untrusted import MOST_JSON, fault, parse_json, read_bytes
from keeplora.distributed import processes
from keeplora.lora import LoraSlot, require_whole
from keeplora.lora.engines import DATA_PARALLEL
from keeplora.methods.method import Method
from keeplora.methods.state import StateError, read_state

from ._task_hooks import TaskHooks, refuse_untrainable
from .fsdp2 import settle_engine

__all__ = ["KeepLoraCallback"]

FOLDER = "keeplora"
"""Where in a checkpoint of Trainer's the method's state is."""
STORE = "_keeplora-files"
"""Beside the checkpoints: what they have in common, each with hard links to it. Trainer uploads no ``_*``."""


class KeepLoraCallback(TrainerCallback):
    r"""Lets a ``transformers.Trainer`` train the task that a method has open, and puts the method into its checkpoints.

    The three calls of every loop stay where they are:

        trainer = Trainer(model, args, train_dataset=task, callbacks=[KeepLoraCallback(keeper)])
        loader = trainer.get_train_dataloader()
        keeper.before_task(loader, loss_fn)
        trainer.train()
        keeper.after_task(loader)

    When training begins, the callback checks that a task is open and that Trainer's optimizer holds its parameters, and
    lets the method adopt that optimizer: with ``train_a`` KeepLoRA keeps A outside of what is protected in every step.
    Methods that need an optimizer of their own refuse Trainer's; give them theirs with
    ``trainer.optimizer = method.optimizer(lr=…)`` between ``before_task`` and ``train()``.

    A method's penalty Ω counts once in every optimizer step, however many batches are accumulated:

    $$ g = \nabla \Omega + \nabla \ell $$

    before gradients are clipped. Its gradient is added when the model's forward has run on the step's first batch.
    The loss that Trainer logs is ℓ alone.

    Every checkpoint gets a folder ``keeplora`` with the method's state; in a new process [`resume`][] reads it,
    before ``train(resume_from_checkpoint=…)`` reads the rest. Checkpoints share what earlier tasks left by hard links
    to ``_keeplora-files`` beside them, which keeps what any of them needs, whichever Trainer deletes.

    What a task has learned is in the model's own weights after ``after_task`` alone: ``trainer.save_model()`` before it
    writes a file that behaves like the model before the task, and a warning says so. What splits parameters up or takes
    them away (DeepSpeed, FSDP1, offloading), and several GPUs in one process, are refused. A Trainer with FSDP2 needs a
    model that [`keeplora.integrations.shard`][] has cut up before the method was made.

    Args:
        method: A [`keeplora.KeepLora`][], or another method, of the model that is trained or of a part of it.

    Raises:
        ValueError: the method trains nothing (zero-shot), or on all tasks at once (joint); at ``train()``, the method
            cannot be trained with this optimizer.
        TypeError: the model is sharded or offloaded, or Trainer would shard it in ``train()``.
        RuntimeError: ``train()`` begins while no task is open, or with an optimizer made for an earlier task, or goes
            on from a checkpoint that [`resume`][] has not read; or Trainer took a step without calling the model's
            forward, which leaves the penalty out.

    Examples:
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

    @named
    def __init__(self, method: Method):
        refuse_untrainable("KeepLoraCallback", method, shares=True)
        self.method = method
        self._settle_engine(method.model)
        self._hooks: TaskHooks | None = None
        self._penalty_due = False
        self._resumed: int | None = None

    def resume(self, checkpoint: str | os.PathLike[str]) -> None:
        """Bring the method and its model to where they were when Trainer saved ``checkpoint``.

        Call it in place of ``before_task``, and ``train(resume_from_checkpoint=checkpoint)`` next. The method must be
        around the pretrained model it was first made for.

        Raises:
            StateError: no state in the checkpoint, a damaged one, or one of another model; or not Trainer's own state.
        """
        with processes(self.method.group).together():
            state = read_state(Path(checkpoint) / FOLDER)
            step = _step_of(Path(checkpoint) / TRAINER_STATE_NAME)
            self.method.load_state(state)
        self._resumed = step

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Refuse a Trainer that would shard or wrap the model otherwise than the method needs, before data are read."""
        if model is not None:
            self._settle_engine(model)

    def _settle_engine(self, model: nn.Module) -> None:
        """Where a Trainer has been made, whose accelerator is everybody's."""
        if is_initialized():
            settle_engine("KeepLoraCallback", AcceleratorState(), self.method, model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **_: Any,
    ) -> None:
        """Refuse where no task is open or the optimizer is an earlier task's; honour what the method asks for."""
        assert model is not None
        for each, around in ((self.method.model, False), (model, True)):
            require_whole("KeepLoraCallback", each, around=around, shares=self.method.shared_out)
        self._settle_engine(model)
        if args.n_gpu > 1:
            raise DATA_PARALLEL.error("KeepLoraCallback", f"a Trainer on {args.n_gpu} GPUs in one process")
        self._penalty_due = False
        self._hooks = TaskHooks(
            "KeepLoraCallback",
            self.method,
            optimizer,
            "Trainer must call the model's forward: train a module whose forward returns the loss.",
        )
        self._hooks.add(model.register_forward_hook(self._after_forward))
        try:
            self._check_start(args, state)
        except BaseException:
            self._hooks.close()
            raise

    def _check_start(self, args: TrainingArguments, state: TrainerState) -> None:
        resumed, self._resumed = self._resumed, None
        if state.global_step != (resumed or 0):
            raise RuntimeError(
                f"KeepLoraCallback: training must begin where the method stands, at step {resumed or 0}, got "
                f"{state.global_step}. Call callback.resume(checkpoint), then "
                "trainer.train(resume_from_checkpoint=checkpoint)."
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The next forward adds the penalty."""
        self._penalty_due = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_forward(self, model: nn.Module, *_: Any) -> None:
        """Add the penalty in the first training pass of a step. Trainer has no gradients from before it then."""
        if self._penalty_due and self._hooks is not None and model.training and torch.is_grad_enabled():
            self._penalty_due = False
            self._hooks.add_penalty_gradient()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the method's state beside Trainer's checkpoint."""
        if not state.is_world_process_zero and not self.method.shared_out:
            return
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if not checkpoint.is_dir():
            raise RuntimeError(
                f"KeepLoraCallback: Trainer's checkpoint must be at {checkpoint}, got nothing there. Hyperparameter "
                "search, which saves elsewhere, is not supported."
            )
        self.method.save(checkpoint / FOLDER, store=checkpoint.parent / STORE)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Take the hooks away."""
        if self._hooks is None or model is None:
            return
        self._hooks.close()
        told = model.register_state_dict_pre_hook(_SavedTooSoon(self.method))  # type: ignore[no-untyped-call]
        self._hooks.add(told)  # until training goes on


def _step_of(file: Path) -> int:
    """The step at which Trainer wrote this file. Its losses may be NaN."""
    try:
        state = parse_json(read_bytes(file, most=MOST_JSON), finite=False)
    except (OSError, ValueError) as error:
        raise StateError(f"resume: {file} must {fault(error)}") from error
    step = state.get("global_step") if isinstance(state, dict) else None
    if isinstance(step, bool) or not isinstance(step, int):
        raise StateError(f"resume: {file} must say at which step Trainer wrote it, got global_step={step!r}")
    return step


class _SavedTooSoon:
    """Says once that a model whose task is open is saved without what the task has learned."""

    def __init__(self, method: Method):
        self.method: Method | None = method

    def __getstate__(self) -> dict[str, Any]:
        return {"method": None}  # a copy of the model, or a pickle, does not carry the method with it

    def __call__(self, model: nn.Module, *_: Any) -> None:
        method = self.method
        if method is None or not method.training_task:
            return
        if any(isinstance(module, LoraSlot) and module.adapter is not None for module in model.modules()):
            self.method = None
            warn(
                f"KeepLoraCallback: the task must be closed before the model is saved, got an open task of "
                f"{method.name!r}: its adapters are not in the model's own weights yet, and the file behaves like the "
                "model before the task. Call after_task(loader), and merge() for plain layers, then save; or save the "
                "open task with the method's save(folder)."
            )
