"""Parameters outside of bases, for the tests of what keeps them there."""

import torch
from torch import nn


def basis(d, k, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(d, max(k, 1), dtype=torch.float64)).Q[:, :k].to(dtype).contiguous()


def outside(rows, q):
    return rows - rows @ q @ q.T


def confined(r, d, k, dtype=torch.float32):
    """A parameter and its basis."""
    q = basis(d, k, dtype)
    return nn.Parameter(outside(torch.randn(r, d, dtype=dtype), q)), q


def leak(a, q):
    a, q = a.detach().double(), q.double()
    return ((a @ q).norm() / a.norm()).item()


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def twins(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def trained(optimizer, params, steps):
    for step in steps:
        give_gradients(params, step)
        optimizer.step()
