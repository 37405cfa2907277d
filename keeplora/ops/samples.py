"""Inputs the ops declare themselves with."""

import torch
from torch import Tensor

__all__ = ["random_basis"]


def random_basis(d: int, k: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A random ``[d, k]`` matrix with orthonormal columns; ``k`` may be 0."""
    square: Tensor = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    return square[:, :k].to(device, dtype).contiguous()
