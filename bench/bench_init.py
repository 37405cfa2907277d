"""B3: adapter initialisation from ready gradients, against the public code's dense projector and svd_lowrank."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench import reference
from bench.harness import Case
from bench.plans import by_plan
from keeplora.math.lowrank import top_directions

# label, out, in, protected directions, rank, matrices on a GPU, matrices on a CPU
SIZES = [
    ("CLIP ViT-B/16 vision, first task", 768, 768, 200, 16, 48, 4),
    ("CLIP ViT-B/16 vision, later task", 768, 768, 600, 16, 48, 4),
    ("CLIP ViT-B/16 text", 512, 512, 100, 16, 48, 4),
    ("LLaVA attention", 4096, 4096, 600, 64, 32, 0),
]


def gradients(
    out: int, d: int, k: int, rank: int, matrices: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor], int]:
    """Gradients with singular values ~ 1/i, as measured on real ones, and bases drawn apart from them."""
    generator = torch.Generator(device).manual_seed(0)
    scale = 1.0 / torch.arange(1, min(out, d) + 1, device=device)

    def frame(rows: int, columns: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, columns, generator=generator, device=device)).Q

    g = [(frame(out, len(scale)) * scale) @ frame(d, len(scale)).T for _ in range(matrices)]
    return g, [frame(d, k) for _ in range(matrices)], rank


def ours(g: list[Tensor], q: list[Tensor], rank: int) -> list[Tensor]:
    return [top.a for top in top_directions(g, q, rank)]


def public(g: list[Tensor], q: list[Tensor], rank: int) -> list[Tensor]:
    return [reference.directions(matrix, basis, rank) for matrix, basis in zip(g, q, strict=True)]


def factored_svd_lowrank(g: list[Tensor], q: list[Tensor], rank: int) -> list[Tensor]:
    """The strongest short version in plain PyTorch: no dense projector, width 2r with 2 iterations."""
    return [torch.svd_lowrank(m - (m @ b) @ b.T, q=2 * rank, niter=2)[2][:, :rank].T for m, b in zip(g, q, strict=True)]


def cases() -> Iterator[Case]:
    for label, out, d, k, rank, gpu, cpu in SIZES:
        if not cpu and not torch.cuda.is_available():
            continue
        yield Case(
            id="B3",
            name=f"top_directions / {label} {out}x{d}, k {k}, rank {rank} / {gpu} on a GPU, {max(cpu, 1)} on a CPU",
            setup=lambda device, s=(out, d, k, rank), gpu=gpu, cpu=cpu: gradients(
                *s, max(cpu, 1) if device.type == "cpu" else gpu, device
            ),
            providers={
                "keeplora": ours,
                **by_plan(ours),
                "dense projector + svd_lowrank(4r, 4) (public code)": public,
                "factored + svd_lowrank(2r, 2)": factored_svd_lowrank,
            },
        )
