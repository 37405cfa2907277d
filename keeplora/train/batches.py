"""What a task's passes over data are made of: the first batches of one, several as one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from keeplora.tasks.workload import Batches

__all__ = ["First", "Union"]


@dataclass(frozen=True)
class First:
    """The first ``length`` batches of a pass."""

    whole: Batches
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.whole), self.length)


@dataclass(frozen=True)
class Union:
    """Several passes as one: every batch of each, in an order that ``seed`` decides; each pass keeps its own order."""

    passes: Sequence[Batches]
    seed: int

    def __len__(self) -> int:
        return sum(len(batches) for batches in self.passes)

    def __iter__(self) -> Iterator[Any]:
        order = [i for i, batches in enumerate(self.passes) for _ in range(len(batches))]
        random.Random(self.seed).shuffle(order)
        running = [iter(batches) for batches in self.passes]
        for i in order:
            yield next(running[i])
