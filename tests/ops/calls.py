"""Calls of the ops that have a kernel, of sizes that occupy a GPU: what streams and CUDA graphs are tried on.

Another seed gives other numbers in tensors of the same shapes, and so other results: a kernel that reads the wrong
ones is seen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import keeplora.ops

QKV = [(0, 768), (768, 1536), (1536, 2304)]
PROJECTED = [(16, 768, 300), (16, 512, 0), (8, 100, 100), (3, 33, 7)]  # rows, d, k
MERGED = [(768, 768, 16, torch.float32), (100, 257, 3, torch.bfloat16), (64, 512, 0, torch.float16)]  # out, in, r
ORTHOGONAL = [(768, 32, 300), (512, 70, 0), (100, 8, 100)]  # d, columns, k


class Draw:
    """Normal numbers, the same on every device."""

    def __init__(self, device, seed):
        self.device, self.seed = device, seed
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, dtype=torch.float32):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, dtype)

    def basis(self, d, k):
        # Made in float64 and rounded once: a float32 QR is itself off by more than rounding.
        return torch.linalg.qr(self(d, max(k, 1), dtype=torch.float64)).Q[:, :k].float().contiguous()


def lora_grad_b(draw):
    dy, t = draw(2000, 2304, dtype=torch.bfloat16), draw(2000, 28)
    return {"dy": dy, "t": t, "columns": [(0, 16), (16, 24), (24, 28)], "rows": QKV, "scale": 0.5}


def merge_weights(draw):
    w = [draw(rows, columns, dtype=dtype) for rows, columns, _, dtype in MERGED]
    a, b = [draw(r, columns) for _, columns, r, _ in MERGED], [draw(rows, r) for rows, _, r, _ in MERGED]
    return {"w": w, "a": a, "b": b, "scale": 0.5, "origin": [draw(*b[0].shape), None, None]}


def orthonormalize(draw):
    def columns(d, width):
        # Seed 0: columns far from one another. Others: some that take a kernel further rounds.
        falling = torch.logspace(0, -7.0 if draw.seed else 0.0, width, device=draw.device, dtype=torch.float64)
        return (draw(d, width, dtype=torch.float64) * falling @ draw.basis(width, width).double()).float()

    return {"y": [columns(d, width) for d, width, _ in ORTHOGONAL], "q": [draw.basis(d, k) for d, _, k in ORTHOGONAL]}


def project_rows(draw):
    g, q = [draw(rows, d) for rows, d, _ in PROJECTED], [draw.basis(d, k) for _, d, k in PROJECTED]
    return {"g": g, "q": q, "scale": 0.5, "passes": 2}


def projected_adamw(draw):
    parameters = {name: [draw(rows, d) for rows, d, _ in PROJECTED] for name in ("a", "grad", "exp_avg")}
    squares = [draw(rows, d).square() for rows, d, _ in PROJECTED]
    q = [draw.basis(d, k) for _, d, k in PROJECTED]
    return {**parameters, "exp_avg_sq": squares, "q": q, "step": 2, "lr": 0.1}


def sketch_rows(draw, dtype):
    x, delta = draw(12608, 96, dtype=dtype), draw(12608, 200, dtype=dtype)
    return {"x": x, "delta": delta, "width": 20, "seed": 1, "out": draw(20, 96)}


@dataclass(frozen=True)
class Call:
    op: str
    make: Callable[[Draw], dict[str, Any]]
    kind: str = ""

    def __str__(self):
        return f"{self.op}{self.kind and '-'}{self.kind}"

    def arguments(self, device, seed=0):
        return self.make(Draw(device, seed))

    def run(self, arguments):
        """Everything the call produces: its outputs, and its arguments afterwards, some of which it writes."""
        return tensors([getattr(keeplora.ops, self.op)(**arguments), list(arguments.values())])


CALLS = [
    Call("lora_grad_b", lora_grad_b),
    Call("merge_weights", merge_weights),
    Call("orthonormalize", orthonormalize),
    Call("project_rows", project_rows),
    Call("projected_adamw", projected_adamw),
    # Two products: the faster one for numbers that are bfloat16 on both sides.
    Call("sketch_rows", partial(sketch_rows, dtype=torch.float32), "float32"),
    Call("sketch_rows", partial(sketch_rows, dtype=torch.bfloat16), "bfloat16"),
]


def clone(tree):
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {name: clone(value) for name, value in tree.items()}
    return type(tree)(clone(item) for item in tree) if isinstance(tree, list | tuple) else tree


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for item in tree for t in tensors(item)] if isinstance(tree, list | tuple) else []


def overwrite(arguments, others):
    """The numbers of other arguments, in the memory of these."""
    for mine, other in zip(tensors(arguments), tensors(others), strict=True):
        mine.copy_(other)
