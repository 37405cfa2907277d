"""How long a benchmark will take, measured on the machine that is to run it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from keeplora.compare.runs import unfinished
from keeplora.methods import METHODS
from keeplora.statistics import first_batches
from keeplora.tasks.workload import Workload
from keeplora.train.config import RunConfig
from keeplora.train.config_checks import BOTH
from keeplora.train.measure import rounds_within

_START_SECONDS = 8.0
"""A worker process imports torch and the model's library."""
_MARGIN = 1.3
"""Decompositions, saving, and steps that cost more than the plain model's."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one training step, of one evaluation of all tasks, and of everything."""

    step: float
    evaluation: float
    total: float

    def __str__(self) -> str:
        return (
            f"about {readable(self.total)} (a step takes {1000 * self.step:.0f} ms here, "
            f"evaluating all tasks {self.evaluation:.1f} s)"
        )


def announcement(config: RunConfig, workload: Workload | None) -> str:
    """What is about to run and how long it will take, in a sentence; nothing runs without ``workload``."""
    waiting = unfinished(config)
    runs, done = len(config.pairs()), len(config.pairs()) - len(waiting)
    names = dict.fromkeys(label.partition("@")[0] for label in config.labels())
    rates = f", {len(config.labels())} settings" if len(names) < len(config.labels()) else ""
    title = f"{len(names)} methods{rates} x {len(config.seeds)} seeds on {config.benchmark}"
    if workload is None or not waiting:
        return f"{title}: all {runs} runs are finished in {config.out}"
    left = f"{len(waiting)} of {runs} runs are left" if done else f"{runs} runs"
    return (
        f"{title}: {left}, {max(config.workers, 1)} at a time, {estimate(config, workload, waiting)}; into {config.out}"
    )


def estimate(config: RunConfig, workload: Workload, pairs: Sequence[tuple[str, int]]) -> Estimate:
    """What the runs in ``pairs`` will take: two steps and one evaluation of the plain model are timed.

    An estimate, not a promise: machines that other programs use are slower, and methods differ.
    """
    model = workload.model().to(config.device)
    batches = workload.batches(0, config.batch_size, 0)
    parts = iter(batches)
    torch.set_num_threads(config.threads)
    with torch.autocast(config.device, dtype=torch.bfloat16, enabled=config.computes_in == "bf16"), sdpa_kernel(
        [SDPBackend.MATH]
    ):  # fmt: skip
        step = 0.0
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            workload.loss(model, next(parts, next(iter(batches)))).backward()  # type: ignore[no-untyped-call]
            step = time.perf_counter() - started
        started = time.perf_counter()
        with torch.no_grad():
            for task in [*range(len(workload.tasks)), *([] if workload.witness is None else [None])]:
                workload.accuracy(model.eval(), task, config.split, config.evaluation_batch_size)
            evaluation = time.perf_counter() - started
            extra = 0.0
            if config.evaluate_on == BOTH:
                started = time.perf_counter()
                for task in range(len(workload.tasks)):
                    workload.accuracy(model, task, "validation", config.evaluation_batch_size)
                extra = time.perf_counter() - started
    tasks = len(workload.tasks)
    steps = sum(config.steps_of(task, len(batches)) for task in range(tasks)) / tasks
    seen = len(first_batches(batches, config.switch_fraction))
    switch = seen + seen / 3  # a pass with gradients before the task, one without after it
    once = evaluation / (tasks + (workload.witness is not None))
    timed = 2 * rounds_within(once) * once  # inference, on one task
    total = len(pairs) * timed
    for label, _ in pairs:
        entry = METHODS[config.of(label).method].build
        if not getattr(entry, "trains", True):
            total += evaluation + extra
            continue
        rounds = (tasks + 1) / 2 if getattr(entry, "joint", False) else 1
        total += tasks * (rounds * (steps + switch) * step * _MARGIN + evaluation) + extra * (tasks + 1) / 2
    workers = max(1, min(config.workers, len(pairs)))
    return Estimate(step, evaluation, total / workers + (_START_SECONDS if config.workers else 0.0))


def readable(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
