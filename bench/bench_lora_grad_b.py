"""B6: lora_grad_b of one layer, against the products written out and torch.compile."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case
from keeplora.ops import lora_grad_b

RANK, SCALE = 16, 0.5
Spans = list[tuple[int, int]]
# label, tokens, (start, stop) of each adapter's rows; on a CPU fewer tokens
QKV = [(0, 768), (768, 1536), (1536, 2304)]
GPU_SIZES = [("qkv of ViT-B/16, batch 64", 12608, QKV), ("d 4096", 8192, [(0, 4096)])]
CPU_SIZES = [
    ("qkv of ViT-B/16, batch 8", 1576, QKV), ("a layer of ViT-B/16", 2048, [(0, 768)]), ("d 4096", 2048, [(0, 4096)]),
]  # fmt: skip


def inputs(tokens: int, rows: Spans, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """dy and t in one dtype; on a GPU t in float32, as a layer forms it there."""
    dy = torch.randn(tokens, max(stop for _, stop in rows), device=device).to(dtype)
    t = torch.randn(tokens, RANK * len(rows), device=device)
    return dy, t if device.type == "cuda" else t.to(dtype), rows


def ours(dy: Tensor, t: Tensor, rows: Spans) -> Any:
    columns = [(RANK * i, RANK * (i + 1)) for i in range(len(rows))]
    return lora_grad_b(dy, t, columns=columns, rows=rows, scale=SCALE)


def products(dy: Tensor, t: Tensor, rows: Spans) -> Any:
    """In the dtype of dy, whose sums are rounded to it."""
    parts = t.to(dy.dtype).split(RANK, 1)
    return [(dy[:, start:stop].T @ part).float() * SCALE for (start, stop), part in zip(rows, parts, strict=True)]


def turned_products(dy: Tensor, t: Tensor, rows: Spans) -> Any:
    """As (tᵀ dy)ᵀ, which keeps a gemm's inner loop long on a CPU."""
    parts = zip(rows, t.to(dy.dtype).split(RANK, 1), strict=True)
    return [((part.T @ dy[:, start:stop]).float() * SCALE).T.contiguous() for (start, stop), part in parts]


def wide_products(dy: Tensor, t: Tensor, rows: Spans) -> Any:
    """In float32 throughout, which has the same precision as the op."""
    return turned_products(dy.float(), t.float(), rows)


def read(dy: Tensor, t: Tensor, rows: Spans) -> Any:
    """The ceiling: read dy and t once."""
    return dy.sum(), t.sum()


def cases() -> Iterator[Case]:
    gpu_here = torch.cuda.is_available()
    for label, tokens, rows in GPU_SIZES if gpu_here else CPU_SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            providers: dict[str, Callable[..., Any]] = {"keeplora": ours, "products": products}
            providers["products, turned"] = turned_products
            if dtype != torch.float32:
                providers["products in float32"] = wide_products
            if gpu_here:
                providers["products, torch.compile"] = torch.compile(products)
            providers["read dy and t (ceiling)"] = read
            outputs, used = max(stop for _, stop in rows), sum(stop - start for start, stop in rows)
            narrow = 4 if gpu_here else dtype.itemsize
            yield Case(
                id="B6",
                name=f"lora_grad_b / {label}, {tokens} tokens, {outputs}, r {RANK} / {str(dtype)[6:]}",
                setup=partial(inputs, tokens, rows, dtype),
                providers=providers,
                bytes=tokens * (dtype.itemsize * outputs + narrow * RANK * len(rows)) + 4 * RANK * used,
                flops=2 * tokens * RANK * used,
                small=partial(inputs, 32, [(0, 24)], dtype),
            )
