r"""Which way matrices are factorised on which device: what is fast on a CPU loops over the matrices on a GPU.

What torch does with a batch on CUDA (its sources, and which cuSOLVER functions its libraries call, 2.11 to 2.15):

| call | torch 2.11 | from 2.12 on |
|---|---|---|
| `eigh` | batched up to 32 columns, else a loop of `syevd` | one `cusolverDnXsyevBatched`, any size |
| `qr` | a loop of `geqrf` from 257 rows on, and of `orgqr` always | the same |
| `svd` | a loop of `gesvdj` from 33 rows on | the same |
| `cholesky`, `solve_triangular` | batched | batched |

So on a GPU nothing here calls `qr` or `svd` for a batch, and `eigh` as few times as there are shapes. The thresholds
come from a model that `docs/kernels.md` writes out ("Factorisations on a GPU"). No GPU has measured them yet; the
benchmarks B2 and B3 have a provider for each way.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CPU", "CUDA", "CUDA_LOOPS", "Plan", "plan_for", "symmetric_eigh"]

BATCHED_SINCE = (2, 12)  # of torch: pytorch/pytorch#175403
BATCHED_UP_TO = 32  # columns, in torch 2.11


@dataclass(frozen=True)
class Plan:
    """The fastest ways on one kind of device.

    Attributes:
        iterative_from: leading eigenvectors of matrices with at least so many rows are first tried by subspace
            iteration (``keeplora.math.sketch.leading_eigenvectors``), which gives up where the rank is not small.
        qr_from: a basis of what is free is formed by a complete QR where there are at least so many inputs; below, an
            eigendecomposition gives it, of many layers at once.
        qr: whether columns that are nearly orthonormal are made so by QR, else by products alone.
        host_up_to: `eigh` of up to so many columns is a job for the host: one transfer there, one back.
    """

    iterative_from: int
    qr_from: int
    qr: bool
    host_up_to: int = 0

    def on_host(self, columns: int, batch: int) -> bool:
        """Whether the eigendecomposition of ``batch`` matrices with so many columns goes to the host."""
        return columns <= self.host_up_to and (batch == 1 or columns > BATCHED_UP_TO)


CPU = Plan(iterative_from=1536, qr_from=0, qr=True)
CUDA = Plan(iterative_from=1536, qr_from=1536, qr=False)
CUDA_LOOPS = Plan(iterative_from=768, qr_from=0, qr=False, host_up_to=128)  # torch 2.11


def plan_for(device: str, version: str = torch.__version__) -> Plan:
    """The plan for a type of device, and a version of torch.

    Examples:
        >>> plan_for("cpu") is CPU, plan_for("cuda", "2.11.0+cu130") is CUDA_LOOPS, plan_for("cuda", "2.12.0") is CUDA
        (True, True, True)
    """
    if device != "cuda":
        return CPU
    major, minor = version.split(".")[:2]
    return CUDA if (int(major), int(minor)) >= BATCHED_SINCE else CUDA_LOOPS


def symmetric_eigh(c: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` where it is fastest. On CUDA it waits for the device, as torch's own does.

    Args:
        c: ``[…, d, d]``, symmetric; only the lower triangle is read.

    Returns:
        ``(values […, d], vectors […, d, d])`` on the device of ``c``, ascending.

    Examples:
        >>> symmetric_eigh(torch.diag(torch.tensor([2.0, 1.0])))[0]
        tensor([1., 2.])
    """
    d = c.shape[-1]
    if plan_for(c.device.type).on_host(d, c.numel() // max(1, d * d)):
        values, vectors = torch.linalg.eigh(c.cpu())
        return values.to(c.device), vectors.to(c.device)
    values, vectors = torch.linalg.eigh(c)
    return values, vectors
