"""B2: accumulating second moments, against the ways torch offers to multiply 16-bit numbers with float32 sums."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case
from keeplora.ops import gram

# label, tokens, d, dtype
GPU_SIZES = [
    ("ViT-B/16, batch 64", 12608, 768, torch.bfloat16),
    ("ViT-B/16, batch 64", 12608, 768, torch.float32),
    ("d 4096", 8192, 4096, torch.bfloat16),
]
CPU_SIZES = [("ViT-B/16, batch 4", 788, 768, torch.float32), ("ViT-B/16, batch 4", 788, 768, torch.bfloat16)]
BLOCKS = 4


def inputs(tokens: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, d, generator=generator, device=device).to(dtype)
    return x, torch.zeros(d, d, device=device), torch.zeros((), dtype=torch.float64, device=device)


def norms(x: Tensor, energy: Tensor) -> None:
    energy += torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).double().square().sum()


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += leftᵀ right`` with float32 sums, widened only where torch cannot do without."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(out, left.T, right, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(left.T.float(), right.float())


def ours(x: Tensor, out: Tensor, energy: Tensor) -> None:
    gram(x, out=out, energy=energy)


def widened(x: Tensor, out: Tensor, energy: Tensor) -> None:
    wide = x.float()
    out.addmm_(wide.T, wide)
    norms(wide, energy)


def one_product(x: Tensor, out: Tensor, energy: Tensor) -> None:
    """Over all rows at once: the sums of tensor cores drift further than gram promises."""
    add_product(out, x, x)
    norms(x, energy)


def upper_blocks(x: Tensor, out: Tensor, energy: Tensor) -> None:
    """What symmetry saves: the blocks on and above the diagonal, then their mirror images."""
    edges = [x.shape[1] * i // BLOCKS for i in range(BLOCKS + 1)]
    for first, last in pairwise(edges):
        add_product(out[first:last, first:], x[:, first:last], x[:, first:])
    for first, last in pairwise(edges):
        out[last:, first:last] = out[first:last, last:].T
    norms(x, energy)


def rounded(x: Tensor, out: Tensor, energy: Tensor) -> None:
    """The product in the dtype of x, then added: for 16-bit x far from the promised precision."""
    out.add_(x.T @ x)
    norms(x, energy)


def cases() -> Iterator[Case]:
    for label, tokens, d, dtype in GPU_SIZES if torch.cuda.is_available() else CPU_SIZES:
        yield Case(
            id="B2",
            name=f"gram / {label}: [{tokens}, {d}] / {dtype}",
            setup=partial(inputs, tokens, d, dtype),
            providers={
                "keeplora": ours,
                "widened, addmm_": widened,
                "one product": one_product,
                "upper blocks": upper_blocks,
                "product in the dtype of x": rounded,
            },
            flops=2 * tokens * d * d,
        )
