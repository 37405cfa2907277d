"""B6: lora_grad_b of one layer, against the products written out and torch.compile."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case
from keeplora.ops import lora_grad_b

RANK, SCALE = 16, 0.5
# label, tokens, in, (start, stop) of each adapter's rows; on a CPU fewer tokens
QKV = [(0, 768), (768, 1536), (1536, 2304)]
GPU_SIZES = [("qkv of ViT-B/16, batch 64", 12608, 768, QKV), ("d 4096", 8192, 4096, [(0, 4096)])]
CPU_SIZES = [("qkv of ViT-B/16, batch 8", 1576, 768, QKV)]


def inputs(
    tokens: int, d_in: int, rows: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> tuple[Any, ...]:
    x = torch.randn(tokens, d_in, device=device).to(dtype)
    dy = torch.randn(tokens, max(stop for _, stop in rows), device=device).to(dtype)
    return x, dy, [torch.randn(RANK, d_in, device=device) for _ in rows], rows


def ours(x: Tensor, dy: Tensor, a: list[Tensor], rows: list[tuple[int, int]]) -> Any:
    return lora_grad_b(x, dy, a, rows=rows, scale=SCALE)


def products(x: Tensor, dy: Tensor, a: list[Tensor], rows: list[tuple[int, int]]) -> Any:
    """In the dtype of x throughout, as a training step in it has them: t is rounded to that dtype."""
    t = x @ torch.cat(a).to(x.dtype).T
    parts = t.split(RANK, 1)
    return t, [(dy[:, start:stop].T @ part).float() * SCALE for (start, stop), part in zip(rows, parts, strict=True)]


def wide_products(x: Tensor, dy: Tensor, a: list[Tensor], rows: list[tuple[int, int]]) -> Any:
    """In float32 throughout, which has the same precision as the op."""
    return products(x.float(), dy.float(), a, rows)


def read(x: Tensor, dy: Tensor, a: list[Tensor], rows: list[tuple[int, int]]) -> Any:
    """The ceiling: read x and dy once."""
    return x.sum(), dy.sum()


def cases() -> Iterator[Case]:
    gpu_here = torch.cuda.is_available()
    for label, tokens, d_in, rows in GPU_SIZES if gpu_here else CPU_SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            providers: dict[str, Callable[..., Any]] = {"keeplora": ours, "products": products}
            if dtype != torch.float32:
                providers["products in float32"] = wide_products
            if gpu_here:
                providers["products, torch.compile"] = torch.compile(products)
            providers["read x and dy (ceiling)"] = read
            outputs, used = max(stop for _, stop in rows), sum(stop - start for start, stop in rows)
            ranks = RANK * len(rows)
            yield Case(
                id="B6",
                name=f"lora_grad_b / {label}, {tokens} tokens, {d_in}->{outputs}, r {RANK} / {str(dtype)[6:]}",
                setup=partial(inputs, tokens, d_in, rows, dtype),
                providers=providers,
                bytes=dtype.itemsize * tokens * (d_in + outputs) + 4 * (tokens * ranks + RANK * used),
                flops=2 * tokens * (d_in * ranks + RANK * used),
            )
