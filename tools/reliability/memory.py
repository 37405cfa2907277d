"""Fifty tasks in a row: no memory, tensors and open files but what is kept of each task."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import torch

import keeplora
from keeplora.methods import KeepLora
from keeplora.train.measure import give_back

from .subjects import fresh, learn, pretrained, same
from .trials import Tries

TASKS, SETTLED = 50, 10
KEPT = 2
"""Tensors of every layer and task that a method keeps: A and B, which ``export_peft`` writes."""
PAGE = os.sysconf("SC_PAGE_SIZE")
GROWTH = 4 * 2**20
"""Bytes by which the process may grow after the first tasks: allocators keep a little of what they were given."""


def held() -> dict[str, int]:
    """What this process has."""
    give_back()  # a freed buffer of 4 MiB, which reading a state takes, may stay with glibc
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    return {"tensors": tensors, "open files": len(os.listdir("/proc/self/fd")), "bytes": resident}


def fifty_tasks(folder: Path, numbers: random.Random) -> Tries:
    """Each task is learned and saved; each state can be loaded and is the method's."""
    method, settled = fresh(), None
    assert isinstance(method, KeepLora)
    for number in range(TASKS):
        learn(method, number)
        method.save(folder)
        loss = None if same(keeplora.load(folder, pretrained()).state(), method.state()) else "another state was loaded"
        if number == SETTLED:
            settled = held()
        if settled is not None and number % 10 == 9:
            now = held()
            grown = {name: now[name] - settled[name] for name in now}
            kept = KEPT * len(method.slots) * (number - SETTLED)
            allowed = {"tensors": kept, "open files": 0, "bytes": GROWTH}
            loss = loss or next(
                (f"{grown[n]} more {n} after task {number + 1}" for n in grown if grown[n] > allowed[n]), None
            )
        yield loss
