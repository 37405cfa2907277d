"""The one life of a task, of every method: opened, trained, closed or abandoned; saved and loaded at any moment.

A method gives what is its own: [`Method.open_task`][], [`Method.close_task`][], [`Method.drop_task`][],
[`Method.named_trained`][], and what a state holds of it (``saved``). The order of calls and the guards are
here, once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora._calls import public
from keeplora._messages import listed, warn
from keeplora.distributed import Group, processes
from keeplora.lora import Target, TokenMask, require_module, require_whole, unwrap
from keeplora.lora.engines import require_rows
from keeplora.lora.shares import is_shared_out, reshard, rows_of
from keeplora.math.finite import first_not_finite
from keeplora.statistics import BatchSize

from .arguments import require_data
from .buffers import Buffers
from .capacity import Capacity
from .flags import flags
from .saved import Saved
from .settings import check_kind

__all__ = ["LossFn", "Method"]

LossFn = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(model, batch) -> scalar``: the mean loss of one batch; runs every tower that is adapted."""


class Method(Saved):
    """One way to learn a sequence of tasks.

    The life of a task: [`before_task`][], then any number of optimizer steps on [`trainable_parameters`][] (add
    [`penalty`][] to the loss, call [`after_step`][] after each step), then [`after_task`][]; or
    [`abandon_task`][], and it never was. Between tasks the model is ready for evaluation.

    Args:
        model: The model; it stays the same object. A method changes nothing but ``self.model`` and itself.
        config: Settings, of ``config_type``; its defaults if None.
        targets: The weights to choose from, where the method adapts chosen weights.
        progress: Whether passes over batches and layers draw bars on stderr; None: if that is a terminal.
    """

    joint: bool = False
    """True for upper bounds that train on the data of all tasks so far, not on the present one's alone."""
    merges: bool = True
    """Whether all that was learned is in the model's own weights after each task, so that inference costs nothing."""

    freezes: ClassVar[bool] = True
    """Whether all but the trained parameters stays as it is while a task is open; see [`frozen_buffers`][]."""

    on_shares: ClassVar[frozenset[str]] = frozenset()
    """The public calls that work where FSDP2 has left every process some rows of each weight; construction is
    ``"made"``. Not inherited: a method names its own."""

    model: nn.Module
    progress: bool | None = None

    token_mask: TokenMask | None = None
    """Which inputs of a layer count as features, instead of what the model's family tells: ``mask(slot, x)`` gives
    ``bool [x.shape[:-1]]``, True where a token counts, or None where all do. Read in every pass over features."""

    group: Group | None = None
    """The ``torch.distributed.ProcessGroup`` of those that share a task's data, each with a model of its own: all that
    is exchanged in [`before_task`][] and [`after_task`][] stays among them. None: the default group."""

    validate: Callable[[], float] | None = None
    """``validate() -> score`` of the model as it is, higher is better, on held-out data of the tasks so far.

    Set by the training loop before [`before_task`][], for methods that choose something in [`after_task`][].
    """

    @public
    def __init__(
        self,
        model: nn.Module,
        config: Any = None,
        *,
        targets: Sequence[Target] | None = None,
        progress: bool | None = None,
    ):
        if targets is not None:
            got = f"got {type(targets).__name__}: {self.name!r} chooses no weights"
            raise ValueError(f"{type(self).__name__}: targets must be None, {got}")
        self._require_kinds(model, config)
        self.shared_out = self._works_on_shares("made") and is_shared_out(model)
        require_whole(type(self).__name__, model, structure=True, shares=self.shared_out)
        if self.shared_out:
            reshard(model)
        self.model, self.progress = model, progress
        self.config = self.config_type() if config is None else config
        self._begin()

    @classmethod
    def _require_kinds(cls, model: object, config: object) -> None:
        """Refuse what is no model, or settings of another method."""
        require_module(cls.__name__, model)
        check_kind(cls.__name__, config, cls.config_type)

    def _begin(self) -> None:
        self._flags = self._flags_before = flags(self.model)
        self._buffers: Buffers | None = None  # as the open task found them
        self._buffers_at_close: Buffers | None = None
        self._loss_fn: LossFn | None = None
        self._batch_size: BatchSize | None = None
        self._given_back = False

    # ------------------------------------------------------------------ what a method is

    @abstractmethod
    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        """Make what is trained. The model must not change its function, nor anything change on an error.

        ``loader`` yields the task's training batches and is iterated once, or not at all.
        """

    @abstractmethod
    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> Any:
        """Take in what was trained; returns the report. Whatever may fail comes before anything is changed."""

    @abstractmethod
    def drop_task(self) -> None:
        """Undo [`open_task`][] and all training since: the model's function is as it was, to the last bit."""

    @abstractmethod
    def named_trained(self) -> list[tuple[str, nn.Parameter]]:
        """What an optimizer should hold for the task that is open, each with a name for messages."""

    # ------------------------------------------------------------------ the life of a task

    @public
    def before_task(
        self,
        loader: Iterable[Any],
        loss_fn: LossFn,
        *,
        batch_size: BatchSize | None = None,
        group: Group | None = None,
    ) -> None:
        """Open a task. The model's function does not change; on an error nothing has changed.

        Args:
            loader: The task's training batches; can be iterated again later.
            loss_fn: ``loss_fn(model, batch) -> scalar``. Remembered for [`after_task`][].
            batch_size: ``batch_size(batch) -> int``: what the batch's loss is a mean over, by which its gradient is
                weighted. By default its samples, read off the leading dimension of the first tensor in it
                (``keeplora.statistics.batch_size_of``). Methods that look at no gradient do not ask.
            group: The processes that share the task; kept as [`group`][]. None leaves that as it is.

        Raises:
            RuntimeError: a task is open already, or the model was given back by [`merge`][].
            TypeError: ``loss_fn`` or ``batch_size`` is no function, or ``loader`` yields nothing.
            ValueError: of several processes some hold other weights.
        """
        with processes(self.group if group is None else group).together():
            self._require("before_task", task=False)
            require_data("before_task", loader, loss_fn, batch_size=batch_size)
            self._require_same_weights("before_task")
            self._batch_size = batch_size
            with self._opening(loss_fn):
                self.open_task(loader, loss_fn)
        self.group = self.group if group is None else group

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters an optimizer should hold for the task that is open.

        Raises:
            RuntimeError: no task is open.
        """
        return self._trained("trainable_parameters")

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        """An AdamW over [`trainable_parameters`][] with these options: what the method is best trained with."""
        return torch.optim.AdamW(self._trained("optimizer"), **options)

    def adopt(self, optimizer: torch.optim.Optimizer) -> Any:
        """Make an optimizer of somebody else's keep what the method promises, or refuse it.

        Returns:
            A handle with ``remove()``, or None where there is nothing to be done.

        Raises:
            ValueError: no hook can make it keep the promise; the message says which optimizer can.
        """
        return None

    def penalty(self) -> Tensor | None:
        """A term to add to the loss of the current step, or None."""
        return None

    def after_step(self) -> None:
        """Called after every optimizer step.

        A loop that is all inside autocast would go on with the half-precision copies of the weights it has trained.
        """
        torch.clear_autocast_cache()

    @public
    @torch.no_grad()
    def after_task(self, loader: Iterable[Any], loss_fn: LossFn | None = None) -> Any:
        """Close the open task; what it returns is reported. On an error the task stays open and nothing has changed.

        Args:
            loader: The task's training batches.
            loss_fn: Runs the model on a batch; by default the one [`before_task`][] was given.

        Raises:
            RuntimeError: no task is open, or no ``loss_fn`` is known (after loading a state).
            ValueError: what was trained is not finite (it is named).

        Warns:
            UserWarning: parameters besides those of the method were left to train; buffers had moved that are frozen,
                and were put back.
        """
        with processes(self.group).together():
            self._require("after_task", task=True)
            forward = loss_fn or self._loss_fn
            if forward is None:
                raise RuntimeError("after_task: loss_fn must be given after loading a state, got None")
            require_data("after_task", loader, forward)
            self._guard("after_task")
            trained = self._trained("after_task")
            self._settle_buffers("after_task")
            with self._buffers.closing() if self._buffers is not None else nullcontext():
                report = self.close_task(loader, forward)
        for parameter in trained:
            parameter.grad = None  # or it would stay with what outlives the task
        self.tasks_learned += 1
        self._buffers_at_close = self._buffers if self.frozen_buffers else None
        self.training_task, self._buffers = False, None
        return report

    @public
    def abandon_task(self) -> None:
        """Close the open task without learning or protecting anything: all is as it was before [`before_task`][].

        The model's outputs are to the last bit, and so are its buffers and gradient flags; the next task can be opened.

        Raises:
            RuntimeError: no task is open.
        """
        if self.trains_weights:  # which are written to
            self._require("abandon_task", task=True)
        for parameter in self._trained("abandon_task"):
            parameter.grad = None
        self.drop_task()
        for parameter, flag in self._flags_before.items():
            parameter.requires_grad_(flag)
        if self._buffers is not None:
            self._buffers.restore()
        self.training_task, self._loss_fn, self._buffers = False, None, None

    def capacity(self) -> Capacity | None:
        """The room that is left for more tasks, of methods that protect a subspace."""
        return None

    @public
    def merge(self) -> nn.Module:
        """Give the model back with its ordinary layers, all that was learned in its weights; returns ``model``.

        Gradient flags are as they were before the method was made. The method cannot be used afterwards: save it first
        if more tasks are to come.

        Raises:
            RuntimeError: a task is open, or the method computes what ordinary layers cannot ([`merges`][]).
        """
        self._require("merge", task=False)
        if not self.merges:
            raise RuntimeError(
                f"merge: what {self.name!r} learned must fit into the model's weights, and does not: it computes more "
                "than the pretrained model in every forward. Keep using method.model."
            )
        self.release()
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self._given_back = True
        return self.model

    def release(self) -> None:
        """Put the model's ordinary layers back."""
        unwrap(self.model)

    # ------------------------------------------------------------------ guards

    @contextmanager
    def _opening(self, loss_fn: LossFn | None) -> Iterator[None]:
        """A task is open once the block has got through."""
        before, buffers = flags(self.model), Buffers(self.model, frozen=self.frozen_buffers)
        try:
            yield
        except BaseException:
            buffers.put_back()
            raise
        self._flags_before, self._buffers = before, buffers
        self._loss_fn, self.training_task = loss_fn, True
        self._hold_buffers("before_task")

    # ------------------------------------------------------------------ buffers

    @property
    def frozen_buffers(self) -> bool:
        """Whether running statistics and all other buffers stay as they are while a task is open.

        True of every method that trains chosen weights, unless its config says ``frozen_buffers=False``.
        """
        return self.freezes and bool(getattr(self.config, "frozen_buffers", True))

    def _hold_buffers(self, function: str) -> None:
        """From now on buffers stay as the open task found them, in train() too."""
        if not self.freezes:
            return
        if self._buffers is None:  # of a task that comes from a state
            self._buffers = Buffers(self.model, frozen=self.frozen_buffers)
        self._buffers.settle(function)
        self._buffers.hold()

    def _settle_buffers(self, function: str) -> None:
        """Put frozen buffers back that something has moved all the same, and name them."""
        if self._buffers is not None:
            self._buffers.settle(function)
        elif self._buffers_at_close is not None and self._buffers_at_close.tell_of_moves(function):
            self._buffers_at_close = None

    def _moved_buffers(self) -> list[str]:
        """Names of the buffers that are not what they were before the open task."""
        return [] if self._buffers is None else self._buffers.moved()

    def _trained(self, function: str) -> list[nn.Parameter]:
        self._require_moment(function, task=True)
        return [parameter for _, parameter in self.named_trained()]

    def _require(self, function: str, *, task: bool | None) -> None:
        """Refuse a call at the wrong moment, or while an engine holds the weights; ``task=None`` is any moment."""
        self._require_moment(function, task=task)
        if self.shared_out:
            require_rows(function, self.model, works=self._works_on_shares(function))
        else:
            require_whole(function, self.model)

    def _works_on_shares(self, function: str) -> bool:
        return function in vars(type(self)).get("on_shares", ())

    def _require_moment(self, function: str, *, task: bool | None) -> None:
        """Refuse a call after ``merge``, one without an open task, one during a task."""
        if self._given_back:
            raise RuntimeError(f"{function}: {self.name} has given its model back by merge(). Make a new one.")
        if task is True and not self.training_task:
            raise RuntimeError(f"{function}: a task must be open, got none. Call before_task(loader, loss_fn) first.")
        if task is False and self.training_task:
            which = "previous" if function == "before_task" else "open"
            raise RuntimeError(
                f"{function}: the {which} task must be closed first. Call after_task(loader) or abandon_task()."
            )

    def _guard(self, function: str) -> None:
        """What must hold of what was trained, before any of it is kept."""
        self._require_finite(function)
        self._require_same_weights(function)
        self._warn_of_neighbours(function)

    def _require_finite(self, function: str) -> None:
        """Refuse what training has driven to NaN or Inf, before it reaches what is kept."""
        trained = self.named_trained()
        wrong = first_not_finite([rows_of(parameter).rows for _, parameter in trained])
        if wrong is not None:
            raise ValueError(
                f"{function}: trained parameters must be finite, got NaN or Inf [{trained[wrong][0]}]. "
                "Go back to the last saved state, or abandon_task(), and lower the learning rate."
            )

    def _require_same_weights(self, function: str) -> None:
        """All processes must learn one task with one model."""
        peers = processes()
        if peers.size > 1:
            peers.require_same(function, self.shared_tensors())

    def shared_tensors(self) -> Mapping[str, Tensor]:
        """What every process must hold alike."""
        return dict(self.model.named_parameters())

    def _warn_of_neighbours(self, function: str) -> None:
        """Name parameters besides those the method trains that were left to train: nothing protects what they do."""
        own = {id(parameter) for _, parameter in self.named_trained()}
        others = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in own]
        if others:
            warn(
                f"{function}: {len(others)} parameters besides those of {self.name!r} have requires_grad, got "
                f"{listed(others)}. What is trained there is neither protected nor saved, and no certificate speaks of "
                "it: freeze them."
            )
