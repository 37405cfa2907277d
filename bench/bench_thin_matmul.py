"""B6: the thin product of a LoRA layer, x Aᵀ, against torch's gemm and oneDNN's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case
from keeplora.ops import thin_matmul

# label, tokens, in, rows of A; CPU only: on a GPU the op is torch's product
SIZES = [
    ("a layer of ViT-B/16", 2048, 768, 16), ("its q, k, v", 2048, 768, 48),
    ("d 4096", 2048, 4096, 16), ("its q, k, v", 2048, 4096, 48),
]  # fmt: skip


def inputs(tokens: int, width: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, width, device=device), torch.randn(rank, width, device=device)


def onednn(x: Tensor, a: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, a, None, "none", [], "")
    return product


def cases() -> Iterator[Case]:
    if torch.cuda.is_available():
        return
    providers: dict[str, Callable[..., Any]] = {
        "keeplora": lambda x, a: thin_matmul(x, a),
        "x @ a.T": lambda x, a: x @ a.T,
    }
    if torch._C._has_mkldnn:
        providers["oneDNN"] = onednn
    for label, tokens, width, rank in SIZES:
        yield Case(
            id="B6",
            name=f"thin_matmul x Aᵀ / {label}, {tokens} tokens, {width}, r {rank} / float32",
            setup=partial(inputs, tokens, width, rank),
            providers={**providers, "read x (ceiling)": lambda x, a: x.sum()},
            bytes=4 * (tokens * (width + rank) + rank * width),
            flops=2 * tokens * width * rank,
            small=partial(inputs, 32, 24, 4),
        )
