"""What a configuration will take, found out by running the beginning of it: a few steps of each method on two tasks."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from keeplora.compare.estimate import readable
from keeplora.compare.runs import check_methods
from keeplora.methods import METHODS
from keeplora.tasks.workload import Batches, Workload
from keeplora.train.config import RunConfig, override
from keeplora.train.loop import run_one
from keeplora.train.measure import KINDS, rounds_within
from keeplora.train.workload import configured_workload

__all__ = ["Trial", "announce_dry_run", "dry_run"]

_BATCHES = (2, 5)
"""Batches of the two tasks of a trial: two numbers, to tell what a batch takes from what a task takes."""


@dataclass(frozen=True)
class Trial:
    """What one method takes, in seconds and bytes.

    Seconds of a step; of a batch in the passes before and after a task, and of what a task switch takes besides; of
    evaluating everything once; of a whole run. ``peak_bytes`` is the most memory its process used.
    """

    label: str
    step: float
    pass_batch: float
    switch: float
    evaluation: float
    total: float
    peak_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.label}: {self.peak_bytes / 1e9:.2g} GB, {readable(self.total)} a seed "
            f"(a step {1000 * self.step:.0f} ms, a task switch {self.switch:.1f} s and "
            f"{1000 * self.pass_batch:.0f} ms a batch, evaluating all tasks {self.evaluation:.1f} s)"
        )


def dry_run(config: RunConfig, workload: Workload) -> list[Trial]:
    """Run the beginning of each method in a process of its own: two tasks of 2 and 5 batches, few samples evaluated.

    Nothing is written into the run's folder. Times are of this machine as busy as it is now.

    Raises:
        ConfigError: a method or setting does not suit the model, as a run would raise it.
    """
    check_methods(config, workload)
    context = multiprocessing.get_context("spawn")
    tasks = range(len(workload.tasks))
    batches = [len(workload.batches(task, config.batch_size, 0)) for task in tasks]
    samples = _samples(workload)
    trials = []
    for label in config.labels():
        with ProcessPoolExecutor(1, mp_context=context) as process:  # one each: the peak is of a whole process
            trials.append(process.submit(_trial, config, label, batches, samples).result())
    return trials


def announce_dry_run(config: RunConfig, workload: Workload, trials: Sequence[Trial]) -> str:
    """The estimates as text, and what all runs take together."""
    runs, at_once = len(config.pairs()), max(1, min(config.workers, len(config.pairs())))
    together = len(config.seeds) * sum(trial.total for trial in trials) / at_once
    memory = at_once * max(trial.peak_bytes for trial in trials) / 1e9
    lines = [str(trial) for trial in trials]
    lines.append(
        f"{runs} runs of {len(workload.tasks)} tasks, {at_once} at a time: about {readable(together)} and "
        f"{memory:.2g} GB ({KINDS[config.device]})"
    )
    return "\n".join([*lines, f"Nothing was trained; {config.out} is as it was."])


def _trial(config: RunConfig, label: str, batches: Sequence[int], samples: Sequence[int]) -> Trial:
    small = _small(config)
    workload = configured_workload(small, config.device)
    with tempfile.TemporaryDirectory() as folder:
        quiet = override(small, out=folder, tensorboard=False, trackers=(), keep_states=False)
        quiet = replace(quiet, epochs=1, steps=None, switch_fraction=1.0, rate_factors=())
        record = run_one(quiet, _Beginning(workload), label, config.seeds[0], folder=Path(folder))
    last = len(record.tasks) - 1
    seen = [min(most, length) for most, length in zip(_BATCHES, batches, strict=False)]
    evaluated = record.evaluate_seconds[-1 if record.steps else 0]  # what never changes is evaluated once
    per_sample = evaluated / sum(_samples(workload)[: last + 1])
    evaluation = per_sample * sum(samples)
    inference = 2 * rounds_within(per_sample * samples[0]) * per_sample * samples[0]
    if not record.steps:
        return Trial(label, 0.0, 0.0, 0.0, evaluation, evaluation + inference, record.peak_bytes)
    joint = getattr(METHODS[config.of(label).method].build, "joint", False)
    step = record.train_seconds[last] / (sum(seen) if joint and last else seen[last])
    pass_batch, switch = _line(record.switch_seconds, seen)
    total = inference
    for task, length in enumerate(batches):
        rounds = task + 1 if joint else 1
        steps = rounds * config.steps_of(task, length)
        if joint and config.steps is not None:
            steps = sum(config.steps_of(earlier, 0) for earlier in range(task + 1))
        passes = rounds * max(1, round(config.switch_fraction * length))
        total += steps * step + passes * pass_batch + switch + evaluation
    return Trial(label, step, pass_batch, switch, evaluation, total, record.peak_bytes)


def _small(config: RunConfig) -> RunConfig:
    if config.own is None:
        return config
    data = replace(config.own.data, evaluate_at_most=2 * config.evaluation_batch_size)
    return replace(config, own=replace(config.own, data=data))


def _line(seconds: Sequence[float], batches: Sequence[int]) -> tuple[float, float]:
    """Slope and start of the line through two points; all in the start where there is one."""
    if len(seconds) < 2 or batches[1] <= batches[0]:
        return 0.0, seconds[-1]
    slope = max(0.0, (seconds[1] - seconds[0]) / (batches[1] - batches[0]))
    return slope, max(0.0, seconds[1] - slope * batches[1])


def _samples(workload: Any) -> list[int]:
    """How many samples each task is evaluated on, where the workload tells; else 1 each, for shares of a whole."""
    count = getattr(workload, "evaluated", None)
    return [1] * len(workload.tasks) if count is None else [count(task) for task in range(len(workload.tasks))]


class _Beginning:
    """The first batches of the first two tasks of another workload."""

    def __init__(self, whole: Any) -> None:
        self._whole = whole
        self.tasks = list(whole.tasks)[: len(_BATCHES)]
        self.witness = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def batches(self, task: int, batch_size: int, seed: int) -> Batches:
        """Its batches, at most those of a trial."""
        return _First(self._whole.batches(task, batch_size, seed), _BATCHES[task])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Its loss."""
        loss: Tensor = self._whole.loss(model, batch)
        return loss


@dataclass(frozen=True)
class _First:
    whole: Batches
    most: int

    def __len__(self) -> int:
        return min(self.most, len(self.whole))

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.whole), len(self))
