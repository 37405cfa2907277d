"""What is measured of a run beside its accuracy: peak memory, and the time of inference."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

KINDS = {
    "cpu": "largest resident set of the process (Python, torch, data and model included)",
    "cuda": "largest memory allocated by torch on the GPU",
}
"""What ``peak_bytes`` measures on each device."""


ROUNDS = 9
"""How often each call is timed."""
_TIMING_SECONDS = 30.0


def rounds_within(seconds: float) -> int:
    """How often two calls that take so long each are timed: `ROUNDS` times, fewer where that takes over half a minute.

    >>> rounds_within(0.1), rounds_within(5.0), rounds_within(600.0)
    (9, 3, 1)
    """
    return max(1, min(ROUNDS, int(_TIMING_SECONDS / (2 * max(seconds, 1e-9)))))


def reset_peak(device: str) -> None:
    """Start a new measurement. Where Linux does not let a process reset its own mark, the old one stays."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    give_back()
    marker = Path("/proc/self/clear_refs")
    if marker.exists():
        try:
            marker.write_text("5")
        except OSError:  # a container may forbid it: then the mark is that of the whole process, an upper bound
            return


def give_back() -> None:
    """Hand the system what earlier runs in this process have left or freed: it would count as this run's.

    After a run on ViT-B/32 0.4 GB waited for the garbage collector, and glibc kept up to 1.8 GB.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak_bytes(device: str) -> int:
    """The largest memory in use since ``reset_peak``, see ``KINDS``."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(usage) * (1 if sys.platform == "darwin" else 1024)


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
