"""B6: merge_weights over all adapted weights of a model, against loops, batches and torch.compile."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case
from keeplora.ops import merge_weights

SCALE = 0.5
# label, rank, dtype of the weights and of the results, (matrices, out, in) groups on a GPU, the same on a CPU
CLIP = [(96, 768, 768)]
LLAVA = [(128, 4096, 4096), (64, 11008, 4096), (32, 4096, 11008)]
MODELS = [
    ("CLIP ViT-B/16", 16, torch.float32, torch.float32, CLIP, CLIP),
    ("CLIP ViT-B/16", 16, torch.float32, torch.bfloat16, CLIP, CLIP),
    ("LLaVA-1.5-7B, seven kinds of layer", 64, torch.bfloat16, torch.bfloat16, LLAVA, [(1, 4096, 4096)]),
]


def inputs(
    rank: int, dtype: torch.dtype, out: torch.dtype, groups: list[tuple[int, int, int]], device: torch.device
) -> tuple[Any, ...]:
    """Weights that are slices of one batch per shape, with a list and a batch of each adapter matrix."""
    w, a, b, batches = [], [], [], []
    for count, d_out, d_in in groups:
        batch = (
            torch.randn(count, d_out, d_in, device=device, dtype=dtype),
            torch.randn(count, rank, d_in, device=device),
            torch.randn(count, d_out, rank, device=device),
        )
        for matrices, stacked in zip((w, a, b), batch, strict=True):
            matrices += stacked.unbind()
        batches.append(batch)
    return w, a, b, batches, out


def ours(w: list[Tensor], a: list[Tensor], b: list[Tensor], batches: Any, out: torch.dtype) -> Any:
    return merge_weights(w, a, b, scale=SCALE, dtype=out)


def loop(w: list[Tensor], a: list[Tensor], b: list[Tensor], batches: Any, out: torch.dtype) -> Any:
    return [
        torch.addmm(weight.float(), up, down, alpha=SCALE).to(out) for weight, down, up in zip(w, a, b, strict=True)
    ]


def foreach(w: list[Tensor], a: list[Tensor], b: list[Tensor], batches: Any, out: torch.dtype) -> Any:
    """One product per weight; the sums of all in a few launches. Adds in place where the product is the sum's dtype."""
    products = [up @ down for down, up in zip(a, b, strict=True)]
    torch._foreach_mul_(products, SCALE)
    torch._foreach_add_(products, w)
    return products if out == torch.float32 else [total.to(out) for total in products]


def batched(w: Any, a: Any, b: Any, batches: list[tuple[Tensor, Tensor, Tensor]], out: torch.dtype) -> Any:
    """Given its inputs already stacked, one batch per shape."""
    return [torch.baddbmm(weights.float(), ups, downs, alpha=SCALE).to(out) for weights, downs, ups in batches]


def batched_as_stored(w: Any, a: Any, b: Any, batches: list[tuple[Tensor, Tensor, Tensor]], out: torch.dtype) -> Any:
    """In the dtype of the weights, which rounds the product to it before the sum."""
    stored = [(weights, ups.to(weights.dtype), downs.to(weights.dtype)) for weights, downs, ups in batches]
    return [torch.baddbmm(*batch, alpha=SCALE).to(out) for batch in stored]


def cast(w: list[Tensor], a: Any, b: Any, batches: Any, out: torch.dtype) -> Any:
    """The ceiling: read every weight and write it in the dtype of the result."""
    return [weights.to(out, copy=True) for weights, _, _ in batches]


def cases() -> Iterator[Case]:
    gpu_here = torch.cuda.is_available()
    providers: dict[str, Callable[..., Any]] = {"keeplora": ours, "loop of addmm": loop}
    providers |= {"loop of products, foreach sums": foreach, "batched baddbmm": batched}
    if gpu_here:
        providers["loop of addmm, torch.compile"] = torch.compile(loop)
        providers["batched baddbmm, torch.compile"] = torch.compile(batched)
    for label, rank, dtype, out, gpu, cpu in MODELS:
        groups = gpu if gpu_here else cpu
        elements = sum(count * d_out * d_in for count, d_out, d_in in groups)
        adapters = sum(count * rank * (d_out + d_in) for count, d_out, d_in in groups)
        yield Case(
            id="B6",
            name=f"merge_weights / {label}, r {rank}: "
            + ", ".join(f"{n} x [{d_out}, {d_in}]" for n, d_out, d_in in groups)
            + f" / {str(dtype)[6:]} to {str(out)[6:]}",
            setup=partial(inputs, rank, dtype, out, groups),
            providers={
                **providers,
                **({} if dtype == torch.float32 else {"batched baddbmm in the weights' dtype": batched_as_stored}),
                "cast W (ceiling)": cast,
            },
            bytes=elements * (dtype.itemsize + out.itemsize) + 4 * adapters,
            flops=2 * rank * elements,
        )
