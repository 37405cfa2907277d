"""Small calls of every CUDA kernel, for compute-sanitizer: python -m bench.sanitize [--device cpu]

Every op that has a kernel runs its sample inputs, odd, empty and ragged ones included, in every dtype it takes, and
project_rows larger groups of unaligned rows too. Results are compared with the op's reference in float64 on the CPU.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from keeplora.ops import build_info
from keeplora.ops.check import FLOATS, MASTER
from keeplora.ops.declare import OPS, Op

SHAPES = [(1, 1, 0), (3, 31, 8), (9, 33, 0), (16, 100, 47), (8, 768, 300), (5, 64, 64), (0, 16, 4), (70, 40, 36)]


def moved(tree: Any, device: torch.device, wide: bool = False) -> Any:
    """A detached copy on ``device``, in float64 if ``wide``."""
    if isinstance(tree, torch.Tensor):
        copy = tree.detach().to(device, copy=True)
        return copy.double() if wide and copy.is_floating_point() else copy
    return type(tree)(moved(item, device, wide) for item in tree) if isinstance(tree, list | tuple) else tree


def tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [t for item in tree for t in tensors(item)] if isinstance(tree, list | tuple) else []


def calls(op: Op, device: torch.device) -> Iterator[tuple[torch.dtype, tuple[Any, ...]]]:
    """Argument tuples of one op. Ops with a basis compute in the dtype of parameters, the others take any."""
    takes = [argument.name for argument in op.call._schema.arguments]
    for dtype in MASTER if {"q", "y"} & set(takes) else FLOATS:
        for sample in op.samples(device, dtype):
            yield dtype, sample
    if op.name == "project_rows":
        for dtype in MASTER:
            g = [torch.randn(r, d, device=device, dtype=dtype) for r, d, _ in SHAPES]
            q = [torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q[:, :k].contiguous() for _, d, k in SHAPES]
            for passes in (1, 2):
                yield dtype, (g, [basis.to(device, dtype) for basis in q], [0.5] * len(g), passes)


def check(op: Op, device: torch.device) -> int:
    """Run one op; how many calls it made. Raises AssertionError where a result is off by more than rounding."""
    count = 0
    for dtype, sample in calls(op, device):
        arguments = moved(sample, device)
        outputs = op.call(*arguments)
        exact = moved(sample, torch.device("cpu"), wide=True)
        expected = op.reference(*exact)
        loose = 100 * torch.finfo(dtype).eps  # samples are small, and their largest entries are near 1
        for found, truth in zip(tensors([outputs, arguments]), tensors([expected, exact]), strict=True):
            if truth.numel():
                error = (found.double().cpu() - truth.double()).abs().max()
                assert error <= loose * truth.double().abs().max().clamp_min(1), (op.name, dtype, error)
        count += 1
    return count


def kernels_of(device: torch.device) -> dict[str, Op]:
    """The ops with a kernel for ``device``; on a CPU all, whose references run there."""
    kernels = OPS if device.type == "cpu" else {name: OPS[name] for name in build_info()["kernels"] or ()}
    if not kernels:
        raise SystemExit("this build of keeplora has no CUDA kernels")
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu runs the references: a check of this program")
    device = torch.device(parser.parse_args().device)
    torch.manual_seed(0)
    for name, op in kernels_of(device).items():
        print(f"{name}: {check(op, device)} calls as expected", flush=True)


if __name__ == "__main__":
    main()
