"""Every kernel once at the benchmarks' sizes, against float64 on the same device: python -m bench.large [--device cpu]

Indices, counters and sums grow with sizes, which the tests of the ops keep small. `--unchecked` runs the kernels alone,
for a profiler.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.sanitize import kernels_of, moved, tensors
from keeplora.ops.declare import OPS

FLOAT, HALF = torch.float32, torch.bfloat16
# rows, width, columns of the basis: three layers of CLIP's and two of LLaVA's, widths of bases that 4 does not divide
PROJECTED = [(16, 768, 330), (16, 768, 264), (16, 512, 41), (64, 4096, 899), (64, 11008, 2200)]


def calls(device: torch.device, shrink: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Names of ops and their arguments; every size is divided by ``shrink``, ranks are not."""

    def made(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def cut(size: int) -> int:
        return max(1, size // shrink)

    def basis(d: int, k: int) -> Tensor:
        return torch.linalg.qr(made(d, k)).Q.contiguous()

    shapes = [(r, max(r, cut(d)), cut(k)) for r, d, k in PROJECTED]
    g = [made(r, d) for r, d, _ in shapes]
    q = [basis(d, k) for _, d, k in shapes]
    yield "project_rows", (g, q, [0.5] * len(g), 2)
    steps = [torch.tensor(10.0, device=device) for _ in g]
    a, grad, m, v = ([made(r, d) for r, d, _ in shapes] for _ in range(4))
    yield "projected_adamw", (a, grad, m, [x.square() for x in v], q, steps, [1e-2] * len(g), 0.9, 0.999, 1e-8, 0.01)
    for count, d_out, d_in, rank, dtype in ((12, 768, 768, 16, FLOAT), (2, 11008, 4096, 64, HALF)):
        size = cut(d_out), max(rank, cut(d_in))
        w = [made(*size, dtype=dtype) for _ in range(count)]
        down, up, origin = ([made(*s) for _ in range(count)] for s in ((rank, size[1]), *[(size[0], rank)] * 2))
        place = [number for k in range(count) for number in (k, 0, size[0], k)]
        yield "merge_weights", (w, down, up, origin, place, [0.5] * count, True, HALF)
    for tokens, spans in ((12608, 3), (8192, 1)):
        out = cut(2304 if spans == 3 else 4096) // spans
        place = [number for i in range(spans) for number in (16 * i, 16 * i + 16, out * i, out * i + out)]
        for dtype in (FLOAT, HALF):
            dy, t = made(cut(tokens), out * spans, dtype=dtype), made(cut(tokens), 16 * spans)
            yield "lora_grad_b", (dy, t, place, [0.5] * spans)
    columns = [(max(2 * w, cut(d)), w, cut(k)) for d, w, k in ((768, 64, 330), (4096, 256, 900))]
    yield "orthonormalize", ([made(d, w) for d, w, _ in columns], [basis(d, k) for d, _, k in columns])
    for dtype in (FLOAT, HALF):
        x, delta = (made(cut(8192), cut(4096), dtype=dtype) for _ in range(2))
        yield "sketch_rows", (torch.zeros(256, x.shape[1], device=device), x, delta, 7)


def error_of(name: str, arguments: tuple[Any, ...], device: torch.device) -> float:
    """The largest error of one call, as a share of what rounding explains."""
    exact = moved(arguments, device, wide=True)
    outputs, expected = OPS[name].call(*arguments), OPS[name].reference(*exact)
    worst = 0.0
    for found, truth in zip(tensors([outputs, arguments]), tensors([expected, exact]), strict=True):
        if not truth.is_floating_point():
            worst = worst if torch.equal(found, truth) else float("inf")
        elif truth.numel():
            # Half a unit of the result's own format, and sums of thousands of products in float32 or TF32 parts.
            allowed = (torch.finfo(found.dtype).eps + 2e-5) * truth.double().abs().max().clamp_min(1e-2)
            worst = max(worst, float((found.double() - truth.double()).abs().max() / allowed))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.large", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu checks the references: a check of this program")
    parser.add_argument("--shrink", type=int, default=1, help="divide the sizes by this")
    parser.add_argument("--unchecked", action="store_true", help="run the kernels and nothing else")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    kernels, bad = kernels_of(device), 0
    for name, arguments in calls(device, options.shrink):
        if name not in kernels:
            continue
        if options.unchecked:
            OPS[name].call(*arguments)
            continue
        error = error_of(name, arguments, device)
        bad += not error <= 1
        print(f"{name:<18} {error:6.3f} of what rounding explains", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
