"""What of some vectors lies in a basis, and what outside: products of a tall matrix with few vectors."""

import torch
from torch import Tensor

from keeplora.ops.declare import OPS

__all__ = ["inside", "outside"]

# With fewer vectors, or a basis so small, BLAS is as fast as the ops for few columns.
_VECTORS, _NUMBERS = 8, 1 << 15


def inside(x: Tensor, q: Tensor) -> Tensor:
    """``x Q [n, k]`` for rows ``x [n, d]``: their coordinates in the basis.

    A gemm packs all of Q for each of the two products. On a CPU the ops of a LoRA layer read it from where it lies.
    """
    if _by_ops(x, q):
        [columns] = OPS["lora_grad_b"].call(q, x.T, [0, len(x), 0, q.shape[1]], [1.0])
        turned: Tensor = columns.T
        return turned
    return x @ q


def outside(x: Tensor, q: Tensor, within: Tensor | None = None) -> Tensor:
    """``x − x Q Qᵀ [n, d]`` for rows ``x [n, d]``; ``within`` is ``inside(x, q)``, where it is known."""
    within = inside(x, q) if within is None else within
    if _by_ops(x, q):
        product: Tensor = OPS["thin_matmul"].call(q, within, 1.0)
        return x - product.T
    return torch.addmm(x, within, q.T, alpha=-1)


def _by_ops(x: Tensor, q: Tensor) -> bool:
    return q.device.type == "cpu" and len(x) >= _VECTORS and q.numel() >= _NUMBERS
