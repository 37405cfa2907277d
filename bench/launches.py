"""What a training step asks of the host: python -m bench.launches

Kernel launches of a step of open_clip's ViT-B/16 with adapters on q, k, v, o of both towers, under bfloat16 autocast;
and for one attention block in float32 the functions that Python calls, autograd's nodes and the host's time. For
KeepLoRA, the frozen model and PEFT. Counted on a CPU, with layers too small to take time: how many calls there are does
not depend on the sizes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import keeplora
from bench import bench_lora_attention, bench_training_step

# Allocations and views under another name: everything else that is no view launches a kernel.
NO_KERNEL = {
    "aten::_unsafe_view", "aten::empty.memory_format", "aten::empty_like", "aten::empty_strided", "aten::new_empty",
    "aten::new_empty_strided", "aten::lift_fresh",
}  # fmt: skip
TOWER = {"layers": 12, "width": 64}
SIZES = (16, {**TOWER, "image_size": 32, "patch_size": 16}, {**TOWER, "heads": 1, "vocab_size": 100})
NAMES = {"ours": "keeplora", "frozen": "frozen model", "plain": "frozen, nn.MultiheadAttention", "peft": "PEFT"}


class Launches(TorchDispatchMode):
    """Counts the calls that launch a kernel or wait for one, by operator.

    Example:
        >>> with Launches() as launches:
        ...     x = torch.ones(2, 3).T.contiguous()
        >>> sorted(launches.by_operator)
        ['aten::clone', 'aten::ones']
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and func.name() not in NO_KERNEL:
            self.by_operator[func.name()] += 1
        return func(*args, **(kwargs or {}))

    def total(self) -> int:
        return self.by_operator.total()


class Calls:
    """Counts the functions that are called, Python's and built-in ones, all of them and those of this package's code.

    Attributes:
        all: How many were called, by whomever.
        ours: How often each was called that is written in keeplora or called from there.

    Example:
        >>> with Calls() as calls:
        ...     length = len("abc")
        >>> calls.all, calls.ours.total()
        (1, 0)
    """

    def __init__(self) -> None:
        self.all = 0
        self.ours: Counter[str] = Counter()
        self._home = str(Path(keeplora.__file__).parent)

    def __enter__(self) -> Calls:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        self.all -= 2  # this function and the one before

    def _count(self, frame: FrameType, event: str, function: Any) -> None:
        if event not in ("call", "c_call"):
            return
        self.all += 1
        if frame.f_code.co_filename.startswith(self._home):
            self.ours[frame.f_code.co_name if event == "call" else function.__name__] += 1


def autograd_nodes(y: Tensor) -> Counter[str]:
    """The nodes that a backward from ``y`` goes through, by kind.

    Example:
        >>> sorted(autograd_nodes(torch.ones(2, requires_grad=True) * 2))
        ['MulBackward0', 'torch::autograd::AccumulateGrad']
    """
    found = {y.grad_fn}
    ahead = [y.grad_fn]
    while ahead:
        node = ahead.pop()
        following = {n for n, _ in node.next_functions if n is not None} - found  # type: ignore[union-attr]
        found |= following
        ahead += following
    return Counter(node.name() for node in found if node is not None)


def count_step(step: Callable[[], None]) -> Counter[str]:
    """The launches of a step as it is after the first, from which later ones know what to form ahead."""
    step()
    with Launches() as launches:
        step()
    return launches.by_operator


def count_steps() -> dict[str, Counter[str]]:
    """The launches of forward and backward, by provider."""
    batch, vision, text_tower = SIZES
    ready, _ = bench_training_step.setup(batch, vision, text_tower, True, torch.device("cpu"), update=False)
    return {name: count_step(ready[key]) for key, name in NAMES.items()}


def _blocks() -> tuple[Callable[[str], Tensor], Callable[[str, Tensor], None]]:
    """Forward and backward of an attention block of a provider, each for the first time as after an optimizer step."""
    x, grad, models, _ = bench_lora_attention.setup(1, 5, torch.float32, torch.device("cpu"), width=64, heads=1)
    for model in models.values():  # few tokens: "auto" would multiply in the factored way
        for module in model.modules():
            if hasattr(module, "forward_mode"):
                module.forward_mode = "merged"
    called = {name: models["keeplora" if key == "ours" else key] for key, name in NAMES.items()}
    trained = [p for model in models.values() for p in model.parameters() if p.requires_grad]

    def forward(name: str) -> Tensor:
        y: Tensor = called[name](x)
        return y

    def backward(name: str, y: Tensor) -> None:
        y.backward(grad)
        for parameter in (x, *trained):
            parameter.grad = None

    for name in called:
        backward(name, forward(name))
    return forward, backward


def count_blocks() -> dict[str, tuple[Calls, Counter[str]]]:
    """Calls and autograd's nodes of forward and backward of one attention block, by provider."""
    forward, backward = _blocks()
    counted = {}
    for name in NAMES.values():
        with Calls() as calls:
            y = forward(name)
        nodes = autograd_nodes(y)
        with calls:
            backward(name, y)
        counted[name] = calls, nodes
    return counted


def host_times(repeats: int) -> dict[str, list[float]]:
    """The seconds that forward and backward of one attention block take, by provider, in turns, in ascending order."""
    forward, backward = _blocks()
    times: dict[str, list[float]] = {name: [] for name in NAMES.values()}
    for _ in range(repeats):
        for name, taken in times.items():
            start = time.thread_time()
            y = forward(name)
            backward(name, y)
            del y
            taken.append(time.thread_time() - start)
    return {name: sorted(taken) for name, taken in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    counts, blocks, times = count_steps(), count_blocks(), host_times(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    frozen, least = counts["frozen model"].total(), statistics.median(times["frozen model"])
    lowest = times["frozen model"][len(times["frozen model"]) // 10]
    print("| model | launches | beyond the frozen step | calls of a block | nodes | host time | of the frozen one's |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in counts:
        total, (calls, nodes), taken = counts[name].total(), blocks[name], times[name]
        middle = statistics.median(taken)
        print(
            f"| {name} | {total} | {total - frozen} | {calls.all} | {nodes.total()} | {1e6 * middle:.0f} µs "
            f"| {middle / least:.2f} ({taken[len(taken) // 10] / lowest:.2f}) |"
        )
    print("\nTimes are medians; in brackets the ratio of the fastest tenths, which other work moves less.")


if __name__ == "__main__":
    main()
