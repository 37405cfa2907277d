"""Where a training step's time goes, by kernel: python -m bench.profile_step [--device cpu --small]

One step of B8 for KeepLoRA, the frozen model and PEFT: the operators that take longest and how often each is called.
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from bench.bench_training_step import cases
from bench.harness import Case

PROVIDERS = ("keeplora", "frozen model", "PEFT")


def profiled(case: Case, name: str, arguments: tuple[object, ...], device: torch.device) -> str:
    """The table of one provider's step, after two to warm up."""
    call = case.providers[name]
    call(*arguments), call(*arguments)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        call(*arguments)
        if cuda:
            torch.cuda.synchronize()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table: str = recorded.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70)
    return f"{name}\n{table}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="the tests' sizes")
    options = parser.parse_args()
    device = torch.device(options.device)
    [case] = cases()
    arguments = (case.small if options.small and case.small else case.setup)(device)
    for name in PROVIDERS:
        print(profiled(case, name, arguments, device), flush=True)


if __name__ == "__main__":
    main()
