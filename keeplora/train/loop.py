"""One run: one method learns a sequence of tasks with one seed."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from keeplora._messages import add_note
from keeplora.methods import METHODS, create
from keeplora.methods.method import Method
from keeplora.statistics.passes import evaluating, first_batches
from keeplora.tasks.workload import Batches, EvenlyWorkload, Workload
from keeplora.train.batches import Union
from keeplora.train.config import RunConfig
from keeplora.train.config_checks import BOTH
from keeplora.train.deterministic import deterministic
from keeplora.train.evaluated import Evaluations
from keeplora.train.evaluation import evaluate
from keeplora.train.events import Event, Listener, silent
from keeplora.train.measure import fastest, peak_bytes, reset_peak, rounds_within
from keeplora.train.plugins import load_plugins
from keeplora.train.record import RunRecord, certificate_figures, load_progress, load_result, save_progress, save_result
from keeplora.train.scalars import Scalars, open_scalars
from keeplora.train.schedule import make_schedule


class NonFiniteLossError(RuntimeError):
    """The loss of a batch is NaN or infinite; the message names the batch."""


def run_one(
    config: RunConfig,
    workload: Workload,
    label: str,
    seed: int,
    *,
    folder: Path | None = None,
    evaluations: Path | None = None,
    listener: Listener = silent,
) -> RunRecord:
    """Let one method learn all tasks of ``workload`` in order, evaluating all of them after each.

    For each task: ``before_task``; the method's AdamW with a one-cycle schedule on its trainable parameters;
    ``after_task``; accuracy on every task and on the witness. With a ``folder``, the state is saved after every
    task, an interrupted run continues after its last finished task, and a finished run is read, not repeated.
    ``evaluations`` is a folder of evaluations that several runs share (``evaluated``).
    All draws follow from ``(seed, task)``: a resumed run gives the numbers of an uninterrupted one, exactly.

    Raises ``NonFiniteLossError``, naming the batch, as soon as a loss is NaN or infinite. Where ``evaluate_on`` is
    "both", which is for looking where rates lead, such a run ends with ``RunRecord.failed``, and the others go on.
    """
    load_plugins(config.plugins)
    identity = config.identity(label, seed)
    if folder is not None:
        finished = load_result(folder, identity)
        if finished is not None:
            listener(Event("done", label, seed, len(finished.tasks), len(finished.tasks), text="already finished"))
            return finished
    torch.set_num_threads(config.threads)
    reset_peak(config.device)
    with deterministic(config.device):
        run = _Run(config, workload, label, seed, folder, evaluations, listener)
        try:
            return run.learn_all(identity)
        except Exception as error:
            if config.evaluate_on != BOTH or not run.diverged(error):
                raise
            return run.give_up(identity, error)
        finally:
            run.scalars.close()


class _Run:
    """The moving parts of ``run_one``."""

    def __init__(
        self,
        config: RunConfig,
        workload: Workload,
        label: str,
        seed: int,
        folder: Path | None,
        evaluations: Path | None,
        listener: Listener,
    ) -> None:
        self.config, self.workload, self.label, self.seed = config, workload, label, seed
        self.folder, self.listener = folder, listener
        self.settings = config.of(label)
        self.names = list(workload.tasks)
        self.record = RunRecord(label=label, seed=seed, tasks=self.names)
        self.evaluations = Evaluations(config, workload, evaluations, self.note)
        self.scalars: Scalars = open_scalars(config, label, seed, folder)
        _seed_everything(seed, 0, "create")
        self.model = workload.model().to(config.device)
        self.method: Method = create(self.settings.method, self.model, seeded_settings(config, label, seed))
        self.method.progress = False  # several runs share a terminal; the listener shows how far they are

    def learn_all(self, identity: dict[str, Any]) -> RunRecord:
        if self.folder is not None and (progress := load_progress(self.folder, identity)) is not None:
            self.record, state = progress
            self.method.load_state(state)
            self.tell("resumed", self.record.finished_tasks, text=f"continues after task {self.done}")
        self.scalars.start_at(self.record.steps)
        for task in range(self.record.finished_tasks, len(self.names)):
            try:
                self.learn(task)
            except Exception as error:
                add_note(error, f"in {self.label}, seed {self.seed}, task {task + 1} ({self.names[task]})")
                raise
            if self.folder is not None and self.method.trains:
                save_progress(self.folder, self.record, self.method.live_state(), identity)
        capacity = self.method.capacity()
        if capacity is not None:
            self.record.capacity = capacity.to_dict()["layers"]
        self.record.inference_seconds = self.inference()
        if self.folder is not None:
            save_result(self.folder, self.record, identity, keep_state=self.config.keep_states)
        self.tell("done", len(self.names), text=self.summary())
        return self.record

    def diverged(self, error: Exception) -> bool:
        """Whether numbers that are not finite are behind this error."""
        weights = (parameter.detach() for parameter in self.model.parameters())
        return isinstance(error, NonFiniteLossError) or not all(bool(weight.isfinite().all()) for weight in weights)

    def give_up(self, identity: dict[str, Any], error: Exception) -> RunRecord:
        """End the run here, with the reason in its record."""
        self.record.failed = str(error)
        if self.folder is not None:
            save_result(self.folder, self.record, identity, keep_state=False)
        self.tell("done", len(self.names), text=f"given up: {error}")
        return self.record

    @property
    def done(self) -> int:
        return self.record.finished_tasks

    def learn(self, task: int) -> None:
        """One task, from the gradient pass to the accuracies."""
        self.tell("task", task)
        _seed_everything(self.seed, task, "task")
        switch = train = 0.0
        certificate, loss = None, 0.0
        if self.method.trains:
            started = time.perf_counter()
            self.method.validate = partial(self.validate, task)
            with self.notes(task):
                self.method.before_task(self.part(task, "before"), self.loss_fn)
            parameters = self.method.trainable_parameters()
            switch += time.perf_counter() - started

            started = time.perf_counter()
            loss = self.train(task) if parameters else 0.0  # no room was left: nothing to train
            train = time.perf_counter() - started

            started = time.perf_counter()
            with self.notes(task):
                certificate = self.method.after_task(self.part(task, "after"), self.loss_fn)
            switch += time.perf_counter() - started
            if self.method.joint and task:
                self.looked_at("training")
            self.record.trainable.append(sum(parameter.numel() for parameter in parameters))
        started = time.perf_counter()
        self.model.eval()
        with torch.no_grad(), self.autocast():
            row, witness = evaluate(self.evaluations, self.method, self.record)
        evaluation = time.perf_counter() - started

        record = self.record
        record.accuracy.append(row)
        record.witness.extend([] if witness is None else [witness])
        record.loss.append(loss)
        record.train_seconds.append(train)
        record.switch_seconds.append(switch)
        record.evaluate_seconds.append(evaluation)
        record.certificates.append(None if certificate is None else certificate_figures(certificate))
        if problem := record.problem():
            raise ValueError(f"run_one: {problem}")
        record.peak_bytes = max(record.peak_bytes, peak_bytes(self.config.device))
        self.scalars.task(record, witness)
        capacity = self.method.capacity()
        self.tell(
            "learned",
            task,
            text=self.report(task, row) if self.method.trains else "",
            certificate="" if certificate is None else str(certificate),
            capacity="" if capacity is None else capacity.summary,
        )

    def train(self, task: int) -> float:
        """Take the optimizer steps of one task; returns the mean loss of the last tenth of them."""
        config = self.config
        first = self.batches(task, epoch=0)
        total = config.steps_of(task, len(first))
        if self.method.joint and config.steps is not None:  # it takes the steps of all its tasks
            total = sum(config.steps_of(earlier, 0) for earlier in range(task + 1))
        rate = config.rate(self.label, task)
        decay = config.weight_decay if self.settings.weight_decay is None else self.settings.weight_decay
        optimizer = self.method.optimizer(lr=rate, weight_decay=decay, fused=True)
        schedule = make_schedule(config, optimizer, rate, total)
        check_every = 1 if config.device == "cpu" else 16  # reading a loss waits for the GPU
        waiting: list[Tensor] = []
        losses: list[float] = []
        self.model.train()
        for step, (epoch, index, batch) in enumerate(islice(self.epochs(task, first), total)):
            loss = self.loss_fn(self.model, batch)
            penalty = self.method.penalty()
            if penalty is not None:
                loss = loss + penalty
            waiting.append(loss.detach())
            if len(waiting) == check_every or step == total - 1:
                values = torch.stack(waiting).tolist()
                self.check(values, task, step, epoch, index)
                losses += values
                waiting.clear()
                self.scalars.step(self.record.steps + 1, losses[-1], float(schedule.get_last_lr()[0]))
                self.tell("step", task, step=step + 1, steps=total, loss=losses[-1])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            self.method.after_step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            self.record.steps += 1
        tail = losses[-max(len(losses) // 10, 1) :]
        return math.fsum(tail) / len(tail)

    def check(self, values: list[float], task: int, step: int, epoch: int, index: int) -> None:
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                late = len(values) - 1 - offset
                raise NonFiniteLossError(
                    f"run_one: the loss must be finite, got {value} in {self.label}, seed {self.seed}, task "
                    f"{task + 1} ({self.names[task]}), step {step - late + 1}, {late} batches before epoch "
                    f"{epoch + 1}, batch {index + 1}. Lower the learning rate "
                    f"({self.config.rate(self.label, task):g}) or use precision fp32"
                )

    def epochs(self, task: int, first: Batches) -> Iterator[tuple[int, int, Any]]:
        """Batches without end: (epoch, index in the epoch, batch)."""
        for epoch in count():
            order = first if epoch == 0 else self.batches(task, epoch)
            for index, batch in enumerate(order):
                yield epoch, index, batch

    def batches(self, task: int, epoch: int) -> Batches:
        return self._sized(task, f"epoch {epoch}")

    def part(self, task: int, purpose: str) -> Batches:
        """The batches a method sees before or after a task."""
        share, evenly = self.config.switch_fraction, self.config.switch_order == "evenly"
        return self._sized(task, purpose, share) if evenly else first_batches(self._sized(task, purpose), share)

    def _sized(self, task: int, purpose: str, share: float = 1.0) -> Batches:
        if not self.method.joint:
            return self._one(task, purpose, share)
        passes = [self._one(t, purpose, share) for t in range(task + 1)]
        return Union(passes, derive_seed(self.seed, task, f"{purpose} joint"))

    def _one(self, task: int, purpose: str, share: float) -> Batches:
        size, seed = self.config.batch_size, derive_seed(self.seed, task, purpose)
        if share < 1 and isinstance(self.workload, EvenlyWorkload):  # check_methods has refused others
            return self.workload.evenly(task, size, seed, share)
        batches = self.workload.batches(task, size, seed)
        if len(batches) == 0:
            raise ValueError(f"run_one: task {self.names[task]!r} must have training data, got none")
        return batches

    def validate(self, task: int) -> float:
        """Mean accuracy of the model on the validation splits of the tasks up to ``task``."""
        if task:
            self.looked_at("validation")
        size = self.config.evaluation_batch_size
        with evaluating(self.model), torch.no_grad(), self.autocast():
            scores = [self.workload.accuracy(self.model, t, "validation", size) for t in range(task + 1)]
        return math.fsum(scores) / len(scores)

    def looked_at(self, data: str) -> None:
        """The method saw this part of earlier tasks again."""
        self.record.earlier_data = sorted({*self.record.earlier_data, data})

    def inference(self) -> list[float]:
        """Seconds of one evaluation by the finished model, merged where its method merges, and by the pretrained one.

        The finished model is made anew from its state and not taken as it is: on the embedded benchmark a trained
        model came out 6 % slower than a fresh one, that of plain full fine-tuning too.
        """
        task = None if self.workload.witness is not None else 0
        split, size = self.config.split, self.config.evaluation_batch_size
        plain, finished = (self.workload.model().to(self.config.device).eval() for _ in range(2))
        method = create(self.settings.method, finished, seeded_settings(self.config, self.label, self.seed))
        method.load_state(self.method.state())
        if method.merges:
            method.merge()
        with torch.no_grad(), self.autocast():
            calls = [partial(self.workload.accuracy, model, task, split, size) for model in (finished.eval(), plain)]
            started = time.perf_counter()
            calls[0]()  # tells how long one takes, and warms up
            return fastest(calls, self.config.device, rounds=rounds_within(time.perf_counter() - started))

    def loss_fn(self, model: nn.Module, batch: Any) -> Tensor:
        with self.autocast():
            return self.workload.loss(model, batch)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of forward passes, and on a CPU the attention kernel with the faster backward.

        On short sequences in bf16 the backward of CPU flash attention takes two thirds of a step; with plain
        matrix products and softmax a step takes 54 ms instead of 123 ms (width 128, 17 tokens, one core).
        """
        device = self.config.device
        with ExitStack() as stack:
            if device == "cpu":
                stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
            enabled = self.config.computes_in == "bf16"
            stack.enter_context(torch.autocast(device, dtype=torch.bfloat16, enabled=enabled))
            yield

    @contextmanager
    def notes(self, task: int) -> Iterator[None]:
        """Pass a method's warnings on to the listener, which shows them beside the run they come from."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
        for warning in caught:
            self.tell("note", task, text=str(warning.message))

    def note(self, text: str) -> None:
        """Tell the listener something about the task that is under way."""
        self.tell("note", self.done, text=text)

    def report(self, task: int, row: list[float]) -> str:
        record = self.record
        known = f", {record.reused[-1]} evaluations known before" if record.reused[-1] else ""
        return (
            f"{self.names[task]} {row[task]:.1%} · mean {np.mean(row):.1%} · loss {record.loss[-1]:.3f} · "
            f"{record.train_seconds[-1]:.1f} s train, {record.switch_seconds[-1]:.1f} s switch, "
            f"{record.evaluate_seconds[-1]:.1f} s evaluate{known}"
        )

    def summary(self) -> str:
        record = self.record
        known = "" if record.trainable or not sum(record.reused) else ", evaluated before by another run"
        seconds = sum(record.train_seconds + record.switch_seconds)
        return f"last {np.mean(record.accuracy[-1]):.1%} in {seconds:.0f} s{known}"

    def tell(self, kind: str, task: int, **rest: Any) -> None:
        name = self.names[task] if task < len(self.names) else ""
        self.listener(Event(kind, self.label, self.seed, task, len(self.names), name=name, **rest))


def seeded_settings(config: RunConfig, label: str, seed: int) -> dict[str, Any]:
    """A method's settings; one that draws numbers of its own and names no seed draws them from the run's."""
    entry = config.of(label)
    draws = entry.method in METHODS and any(item.name == "seed" for item in fields(METHODS[entry.method].config))
    return {**({"seed": seed} if draws else {}), **entry.settings}


def derive_seed(seed: int, task: int, purpose: str) -> int:
    """A seed for one purpose, far from every other.

    >>> derive_seed(0, 1, "before") == derive_seed(0, 1, "before") != derive_seed(1, 0, "before")
    True
    """
    return int(np.random.SeedSequence([seed, task, *purpose.encode()]).generate_state(1)[0])


def _seed_everything(seed: int, task: int, purpose: str) -> None:
    """Seed all generators: a task draws the same numbers whether or not the run was interrupted before it."""
    value = derive_seed(seed, task, purpose)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


__all__ = ["NonFiniteLossError", "derive_seed", "run_one"]
