"""Several passes over data as one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from keeplora.tasks.workload import Batches

__all__ = ["Union"]


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
