"""B7: row sketch of a gradient, against the gradient itself and against a sketch with a stored matrix of signs."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case
from keeplora.ops import random_signs, sketch_rows

SEED = 7
# label, tokens, in, out, width of the sketch
GPU_SIZES = [
    ("d 4096", 8192, 4096, 4096, 256),
    ("qkv of ViT-B/16, batch 64", 12608, 768, 2304, 64),
    ("mlp of ViT-B/16, batch 64", 12608, 768, 3072, 64),
]
CPU_SIZES = [
    ("d 4096", 1024, 4096, 4096, 256),
    ("d 1024", 512, 1024, 1024, 64),
    ("qkv of ViT-B/16, batch 4", 788, 768, 2304, 64),
]


def inputs(tokens: int, d_in: int, d_out: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Activations, gradients of the outputs, and what each provider adds to or reads besides them."""
    generator = torch.Generator(device).manual_seed(0)
    x, delta = (torch.randn(tokens, d, generator=generator, device=device).to(dtype) for d in (d_in, d_out))
    z = torch.zeros(width, d_in, device=device)
    gradient = torch.zeros(d_out, d_in, device=device)
    psi = random_signs(width, d_out, seed=SEED, device=device, dtype=dtype)
    return x, delta, z, gradient, psi


def ours(x: Tensor, delta: Tensor, z: Tensor, gradient: Tensor, psi: Tensor) -> Tensor:
    return sketch_rows(x, delta, width=z.shape[0], seed=SEED, out=z)


def full_gradient(x: Tensor, delta: Tensor, z: Tensor, gradient: Tensor, psi: Tensor) -> Tensor:
    """In the dtype of the inputs with float32 sums, added to a float32 buffer: how gradients are accumulated."""
    return gradient.add_(delta.T @ x)


def full_gradient_float_out(x: Tensor, delta: Tensor, z: Tensor, gradient: Tensor, psi: Tensor) -> Tensor:
    """Without rounding the product to the inputs' dtype, and without a product beside the buffer."""
    if x.device.type == "cpu" or x.dtype == torch.float32:
        return gradient.addmm_(delta.T.float(), x.float())
    return torch.addmm(gradient, delta.T, x, out_dtype=torch.float32, out=gradient)


def stored_signs(x: Tensor, delta: Tensor, z: Tensor, gradient: Tensor, psi: Tensor) -> Tensor:
    return z.add_((psi @ delta.T) @ x, alpha=z.shape[0] ** -0.5)


def signs_anew(x: Tensor, delta: Tensor, z: Tensor, gradient: Tensor, psi: Tensor) -> Tensor:
    """The same with the signs made in every call, as they must be when there is one matrix per layer."""
    fresh = random_signs(z.shape[0], delta.shape[1], seed=SEED, device=x.device, dtype=x.dtype)
    return stored_signs(x, delta, z, gradient, fresh)


def cases() -> Iterator[Case]:
    on_gpu = torch.cuda.is_available()
    for label, tokens, d_in, d_out, width in GPU_SIZES if on_gpu else CPU_SIZES:
        for dtype in (torch.bfloat16, torch.float32) if on_gpu else (torch.float32,):
            yield Case(
                id="B7",
                name=f"sketch_rows / {label}: [{tokens}, {d_in}], [{tokens}, {d_out}], width {width} / {dtype}",
                setup=partial(inputs, tokens, d_in, d_out, width, dtype),
                providers={
                    "keeplora": ours,
                    "full gradient": full_gradient,
                    "full gradient, float32 out": full_gradient_float_out,
                    "stored signs": stored_signs,
                    "signs made in every call": signs_anew,
                },
                flops=2 * width * tokens * (d_in + d_out),
                kept={
                    "keeplora": 4 * width * d_in,
                    "full gradient": 4 * d_out * d_in,
                    "full gradient, float32 out": 4 * d_out * d_in,
                    "stored signs": 4 * width * d_in + dtype.itemsize * width * d_out,
                    "signs made in every call": 4 * width * d_in,
                },
            )
