"""How the learning rate moves within a task."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from keeplora.train.config import RunConfig

__all__ = ["cosine", "make_schedule"]


def make_schedule(config: RunConfig, optimizer: Optimizer, rate: float, steps: int) -> LRScheduler:
    """The schedule of a task with so many steps, whose highest rate is ``rate``."""
    if config.schedule == "one-cycle":
        return OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    return LambdaLR(optimizer, lambda step: cosine(step, steps, config.warmup))


def cosine(step: int, steps: int, warmup: float) -> float:
    """The share of the highest rate in a step, counted from 0: up on a line, then down half a cosine.

    As `transformers.get_cosine_schedule_with_warmup`, with ceil(warmup · steps) steps of warm-up.

    >>> [round(cosine(step, 10, 0.2), 3) for step in (0, 1, 2, 6, 9)]
    [0.0, 0.5, 1.0, 0.5, 0.038]
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return step / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
