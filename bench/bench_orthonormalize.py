"""B3: orthonormalize over all matrices of a model, against torch.linalg.qr and CholeskyQR2 in plain PyTorch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case
from keeplora.ops import orthonormalize

# label, columns, (matrices, d, k) groups on a GPU, the same on a CPU
MODELS = [
    ("CLIP ViT-B/16, q k v o of both towers", 32, [(48, 768, 330), (48, 512, 60)], [(48, 768, 330), (48, 512, 60)]),
    ("LLaVA-1.5-7B, seven kinds of layer", 128, [(192, 4096, 900), (32, 11008, 2200)], [(2, 4096, 900)]),
    ("one wide matrix", 64, [(1, 4096, 600)], [(1, 4096, 600)]),
]


def inputs(width: int, groups: list[tuple[int, int, int]], device: torch.device) -> tuple[Any, ...]:
    """Columns and ragged bases, and the same padded with zeros to one shape per d, as a batch needs them."""
    y, q, padded = [], [], []
    for count, d, k in groups:
        ranks = [max(1, k * (3 + i % 3) // 5) for i in range(count)]
        frame = torch.linalg.qr(torch.randn(d, max(ranks), device=device)).Q
        bases = [frame[:, :r].contiguous() for r in ranks]
        columns = [torch.randn(d, width, device=device) for _ in ranks]
        wide = [torch.nn.functional.pad(basis, (0, max(ranks) - basis.shape[1])) for basis in bases]
        padded.append((torch.stack(columns), torch.stack(wide)))
        y += columns
        q += bases
    return y, q, padded


def ours(y: list[Tensor], q: list[Tensor], padded: Any) -> Any:
    return orthonormalize(y, q)


def without(y: Tensor, q: Tensor) -> Tensor:
    return y - q @ (q.mT @ y)


def loop_of_qr(y: list[Tensor], q: list[Tensor], padded: Any) -> Any:
    return [torch.linalg.qr(without(without(columns, basis), basis)).Q for columns, basis in zip(y, q, strict=True)]


def batched_qr(y: list[Tensor], q: list[Tensor], padded: list[tuple[Tensor, Tensor]]) -> Any:
    """Given its inputs already padded: the padding itself is not timed."""
    return [torch.linalg.qr(without(without(columns, basis), basis)).Q for columns, basis in padded]


def batched_cholesky_qr2(y: list[Tensor], q: list[Tensor], padded: list[tuple[Tensor, Tensor]]) -> Any:
    """The same work as the op's, without its decisions: dependent columns make it fail, condition 1e6 inexact."""
    done = []
    for columns, basis in padded:
        left = without(without(columns, basis), basis)
        for last in (False, True):
            factor = torch.linalg.cholesky_ex(left.mT @ left).L
            left = torch.linalg.solve_triangular(factor, left.mT, upper=False).mT
            if not last:
                left = without(left, basis)
        done.append(left)
    return done


def cases() -> Iterator[Case]:
    providers: dict[str, Callable[..., Any]] = {
        "keeplora": ours,
        "loop of torch.linalg.qr": loop_of_qr,
        "padded batch of torch.linalg.qr": batched_qr,
        "padded batch of CholeskyQR2": batched_cholesky_qr2,
    }
    for label, width, gpu, cpu in MODELS:
        groups = gpu if torch.cuda.is_available() else cpu
        sizes = [(d, max(1, k * (3 + i % 3) // 5)) for count, d, k in groups for i in range(count)]
        yield Case(
            id="B3",
            name=f"orthonormalize / {label}, {width} columns: "
            + ", ".join(f"{n} x [{d}, <= {k}]" for n, d, k in groups),
            setup=partial(inputs, width, groups),
            providers=providers,
            bytes=sum(4 * d * (k + 2 * width) for d, k in sizes),
            # three projections, two Gram matrices and two triangular products
            flops=sum(12 * d * k * width + 8 * d * width**2 for d, k in sizes),
        )
