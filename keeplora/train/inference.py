"""What a method costs when the model is only used."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

ROUNDS = 9


def fastest(calls: Sequence[Callable[[], object]], device: str = "cpu", *, rounds: int = ROUNDS) -> list[float]:
    """The shortest time of each call over some rounds, in seconds.

    The calls take turns, so that a machine that slows down slows all of them; the shortest of a few is what the
    computation takes when nobody disturbs it.

    >>> quick, slow = fastest([lambda: None, lambda: time.sleep(0.01)])
    >>> quick < slow
    True
    """
    best = [float("inf")] * len(calls)
    order = list(range(len(calls)))
    for _ in range(rounds):
        order.reverse()  # whoever comes second finds the data in the caches
        for i in order:
            started = time.perf_counter()
            calls[i]()
            if device == "cuda":
                torch.cuda.synchronize()
            best[i] = min(best[i], time.perf_counter() - started)
    return best
