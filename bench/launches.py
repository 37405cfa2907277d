"""What a training step asks of the host: python -m bench.launches

Kernel launches of a step of open_clip's ViT-B/16 with adapters on q, k, v, o of both towers, under bfloat16 autocast,
and the host's time for one attention block in float32; for KeepLoRA, the frozen model and PEFT. Counted on a CPU, with
layers too small to take time: how many calls there are does not depend on the sizes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


def host_times(repeats: int) -> dict[str, float]:
    """Medians of the seconds that forward and backward of one attention block take, by provider, in turns."""
    x, grad, models, _ = bench_lora_attention.setup(1, 5, torch.float32, torch.device("cpu"), width=64, heads=1)
    for model in models.values():  # few tokens: "auto" would multiply in the factored way
        for module in model.modules():
            if hasattr(module, "forward_mode"):
                module.forward_mode = "merged"
    calls = {name: bench_lora_attention.run_model("keeplora" if key == "ours" else key) for key, name in NAMES.items()}
    trained = [p for model in models.values() for p in model.parameters() if p.requires_grad]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            for parameter in trained:
                parameter.grad = None
            start = time.thread_time()
            call(x, grad, models, {})
            times[name].append(time.thread_time() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    counts, times = count_steps(), host_times(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    frozen, least = counts["frozen model"].total(), times["frozen model"]
    print("| model | launches | launches beyond the frozen step | host time of a block | of the frozen one's |")
    print("|---|---:|---:|---:|---:|")
    for name in counts:
        total, seconds = counts[name].total(), times[name]
        print(f"| {name} | {total} | {total - frozen} | {1e6 * seconds:.0f} µs | {seconds / least:.2f} |")


if __name__ == "__main__":
    main()
