"""What the device reaches at best and what a call costs its host: python -m bench.ceilings [--device cpu] [--json FILE]

The other figures are to be held against these, which come from the same minutes on the same machine.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.graphs import captured

CALLS = 1000


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The shortest of some calls, after two to warm up."""
    if device.type == "cpu":
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return min(times)
    call(), call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return min(times)


def memory_and_products(device: torch.device, size: int) -> dict[str, float]:
    """A copy's GB/s, read and written, and TFLOP/s of square products of ``size``."""
    source = torch.ones(2**10 * size * 32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy_GBs": 2 * source.numel() / seconds_of(lambda: target.copy_(source), device) / 1e9}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("float32", torch.float32, False),
    ):  # fmt: skip
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[f"matmul_{name}_TFLOPs"] = 2 * size**3 / seconds_of(lambda a=a, b=b: a @ b, device) / 1e12  # type: ignore[misc]
        torch.backends.cuda.matmul.allow_tf32 = before
    return found


def calls(device: torch.device) -> dict[str, float]:
    """Microseconds of the host for an operation on one number, and of the device for one in a graph."""
    x = torch.ones(1, device=device)

    def many() -> None:
        for _ in range(CALLS):
            x.add_(1)

    many()
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    many()
    found = {"eager_call_us": (time.perf_counter() - begin) / CALLS * 1e6}
    if device.type == "cuda":
        torch.cuda.synchronize()
        found["graph_call_us"] = seconds_of(captured(many), device) / CALLS * 1e6
    return found


def mma(program: str) -> dict[str, float]:
    """What bench/mma_peak.cu prints, built as ``program``."""
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ceilings", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mma", metavar="PROGRAM", help="bench/mma_peak.cu, built")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    found = calls(device) | memory_and_products(device, 8192 if device.type == "cuda" else 256)
    if options.mma:
        found |= mma(options.mma)
    for name, value in found.items():
        print(f"{name:<24} {value:10.1f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
