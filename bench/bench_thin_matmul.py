"""B6: the two thin products of a LoRA layer, against torch's gemm and oneDNN's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case
from keeplora.ops import thin_matmul

RANK = 16
# label, tokens, in = out; CPU only: on a GPU the op is torch's product
SIZES = [("a layer of ViT-B/16", 2048, 768), ("d 4096", 2048, 4096)]


def inputs(tokens: int, width: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(tokens, width, device=device),
        torch.randn(rank, width, device=device),
        torch.randn(tokens, rank, device=device),
    )


def onednn(x: Tensor, a: Tensor, t: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, a, None, "none", [], "")
    return product


def directions() -> Iterator[tuple[str, dict[str, Callable[..., Any]]]]:
    """x Aᵀ of the forward pass, and dyᵀ t of the backward pass with the inputs' x as dy."""
    forward: dict[str, Callable[..., Any]] = {
        "keeplora": lambda x, a, t: thin_matmul(x, a),
        "x @ a.T": lambda x, a, t: x @ a.T,
    }
    if torch._C._has_mkldnn:
        forward["oneDNN"] = onednn
    yield "x Aᵀ", forward
    yield (
        "dyᵀ t",
        {
            "keeplora": lambda x, a, t: thin_matmul(x.T, t.T),
            "dy.T @ t": lambda x, a, t: x.T @ t,
            "(t.T @ dy).T": lambda x, a, t: (t.T @ x).T.contiguous(),
        },
    )


def cases() -> Iterator[Case]:
    if torch.cuda.is_available():
        return
    for label, tokens, width in SIZES:
        for name, providers in directions():
            yield Case(
                id="B6",
                name=f"thin_matmul {name} / {label}, {tokens} tokens, {width}, r {RANK} / float32",
                setup=partial(inputs, tokens, width, RANK),
                providers={**providers, "read x (ceiling)": lambda x, a, t: x.sum()},
                bytes=4 * (tokens * (width + RANK) + RANK * width),
                flops=2 * tokens * width * RANK,
                small=partial(inputs, 32, 24, 4),
            )
