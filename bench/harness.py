"""Times the providers of a case side by side, and measures the memory each needs.

Providers take turns within one run, so that a clock that changes or a busy machine meets all of them alike; the median
and the 20th and 80th percentiles are reported. CPU: one thread, wall clock. CUDA: events, every call from a cold L2.
"""

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One comparison: the same inputs given to every provider."""

    id: str  # of the table in the documentation: B1 ... B10
    name: str  # op / shapes / dtype, as it appears in the results
    setup: Callable[[torch.device], tuple[Any, ...]]  # inputs, built once, outside the clock
    providers: dict[str, Callable[..., Any]]  # "keeplora" first, then every baseline worth beating
    bytes: int = 0  # compulsory memory traffic; 0 where arithmetic bounds the time
    flops: int = 0  # useful arithmetic; 0 where memory bounds the time
    small: Callable[[torch.device], tuple[Any, ...]] | None = None  # for tests, where setup's inputs take minutes
    kept: dict[str, int] = field(default_factory=dict)  # bytes of what a provider adds to, which is among its inputs
    memory: dict[str, Callable[..., int]] = field(default_factory=dict)  # peak bytes of what works in other processes

    def without(self, text: str) -> "Case":
        """The case without the providers that have ``text`` in their names."""
        return replace(self, providers={name: call for name, call in self.providers.items() if text not in name})


@dataclass(frozen=True)
class Row:
    """What one provider took for one case."""

    id: str
    case: str
    provider: str
    median_s: float
    p20_s: float
    p80_s: float
    repeats: int
    peak_bytes: int
    bytes: int
    flops: int
    kept_bytes: int = 0  # of what it adds to, beside ``peak_bytes``


def cpu_has_bfloat16() -> bool:
    """Whether the CPU's products in bfloat16 are faster than in float32, not tens of times slower."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def keep_freed_memory() -> None:
    """Have malloc keep what is freed instead of returning it to the system, for all providers alike.

    glibc returns the top of the heap when more than a threshold is free there. Which provider crosses it is an accident
    of sizes and order, and the page faults that follow took 3 of 60 ms in B6. With jemalloc, or a heap that stays large
    as in training, there are none.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, value)


def run(
    case: Case, device: torch.device, *, seconds: float = 20.0, failed: dict[str, Exception] | None = None
) -> Iterator[Row]:
    """Measure every provider of ``case``, in about ``seconds`` (at least three repeats whatever they take).

    One that raises in its first call is left out and noted in ``failed``, where that is given.
    """
    arguments = case.setup(device)
    once = _once_on_cuda(device) if device.type == "cuda" else _once_on_cpu
    peaks: dict[str, int] = {}
    took: dict[str, float] = {}
    for name, call in case.providers.items():
        try:  # warms up, too
            peaks[name] = case.memory[name](*arguments) if name in case.memory else _peak_bytes(call, arguments, device)
            took[name] = once(call, arguments)
        except Exception as error:
            if failed is None:
                raise
            failed[name] = error
    providers = {name: call for name, call in case.providers.items() if name in took}
    repeats = int(min(100, max(3, seconds / sum(took.values())))) if took else 0
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, call in providers.items():
            times[name].append(once(call, arguments))
    for name, measured in times.items():
        ordered = sorted(measured)
        low, high = ordered[len(ordered) // 5], ordered[min(len(ordered) - 1, 4 * len(ordered) // 5)]
        median = statistics.median(ordered)
        yield Row(
            case.id, case.name, name, median, low, high, repeats, peaks[name], case.bytes, case.flops,
            case.kept.get(name, 0),
        )  # fmt: skip


def _once_on_cpu(call: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def _once_on_cuda(device: torch.device) -> Callable[[Callable[..., Any], tuple[Any, ...]], float]:
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)  # larger than any L2

    def once(call: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush.zero_()
        begin.record()
        call(*arguments)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return once


def _peak_bytes(call: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> int:
    """Most memory a call holds at once, outputs included, inputs not.

    CUDA: the caching allocator's own high-water mark. CPU: the profiler's record of every allocation and release of
    torch's CPU allocator, added up in order. Scratch that LAPACK or Python takes elsewhere is not in it.
    """
    call(*arguments)  # what is allocated once and kept belongs to no call
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(*arguments)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return recorded_bytes(call, *arguments)[0]


def recorded_bytes(call: Callable[..., Any], *arguments: Any) -> tuple[int, int]:
    """Most bytes that a call on the CPU holds at once, and those that its result still holds."""
    gc.collect()  # what others left, if it went meanwhile, would be taken off
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call(*arguments)
    recorded = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(recorded, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result  # not before: what it holds must not be recorded as released
    return peak, held
