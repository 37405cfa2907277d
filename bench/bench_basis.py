"""B2: the basis update after a task, from the features of one pass, against the public code's two SVDs per matrix."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench import reference
from bench.harness import Case
from bench.plans import by_plan
from keeplora.math.lowrank import extend_basis
from keeplora.ops import gram

THRESHOLD = 0.99
# label, width d, protected directions before of the first (of others up to 1.15 times as many, as after a task, so
# that no shape is there twice), matrices and tokens on a GPU, matrices and tokens on a CPU
SIZES = [
    ("CLIP ViT-B/16 vision, second task", 768, 200, (48, 12608), (1, 12608)),
    ("CLIP ViT-B/16 vision, later task", 768, 560, (48, 12608), (1, 12608)),
    ("CLIP ViT-B/16 text, second task", 512, 100, (48, 4928), (1, 4928)),
]


def features(d: int, k: int, matrices: int, tokens: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of layers with the spectrum of real ones (energies ~ 1/i), and a basis that holds their leading part."""
    generator = torch.Generator(device).manual_seed(0)
    scale = torch.arange(1, d + 1, device=device) ** -0.5
    x, q = [], []
    for i in range(matrices):
        frame = torch.linalg.qr(torch.randn(d, d, generator=generator, device=device)).Q
        x.append(torch.randn(tokens, d, generator=generator, device=device) * scale @ frame.T)
        q.append(frame[:, : k + i % 7 * (k // 40)].contiguous())
    return x, q


def ours(x: list[Tensor], q: list[Tensor]) -> list[Tensor]:
    return [new.q for new in extend_basis(q, [gram(m)[0] for m in x], THRESHOLD)]


def public(x: list[Tensor], q: list[Tensor]) -> list[Tensor]:
    return [reference.extended_basis(tokens.T, basis, THRESHOLD) for tokens, basis in zip(x, q, strict=True)]


def gram_and_eigh(x: list[Tensor], q: list[Tensor]) -> list[Tensor]:
    """The plain way to write ours: float32 eigenvectors of P C P, without the complement or re-orthogonalisation."""
    found = []
    for tokens, basis in zip(x, q, strict=True):
        c = tokens.T @ tokens
        half = c - basis @ (basis.T @ c)
        left = half - (half @ basis) @ basis.T
        values, vectors = torch.linalg.eigh((left + left.T) / 2)
        captured = (c.trace() - values.sum() + values.flip(0).cumsum(0)) / c.trace()
        new = vectors.flip(1)[:, : int((captured < THRESHOLD).sum()) + 1]
        found.append(torch.cat([basis, new], dim=1))
    return found


def cases() -> Iterator[Case]:
    for label, d, k, gpu, cpu in SIZES:
        counts = f"{gpu[0]} x [{d}, {gpu[1]}] on a GPU, {cpu[0]} x [{d}, {cpu[1]}] on a CPU"
        yield Case(
            id="B2",
            name=f"extend_basis / {label}, k {k} / {counts}",
            setup=lambda device, d=d, k=k, gpu=gpu, cpu=cpu: features(
                d, k, *(cpu if device.type == "cpu" else gpu), device
            ),
            small=lambda device, d=d, k=k: features(d // 4, k // 4, 1, d, device),
            providers={
                "keeplora": ours,
                **by_plan(ours),
                "two SVDs (public code)": public,
                "gram + float32 eigh": gram_and_eigh,
            },
        )
