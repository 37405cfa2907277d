"""B4: project_rows over all matrices of a model, against a loop, zero-padded batches and torch.compile."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.graphs import in_graph
from bench.harness import Case
from keeplora.ops import project_rows

# label, rank, (matrices, d, k) groups on a GPU, the same on a CPU
MODELS = [
    ("CLIP ViT-B/16, q k v o of both towers", 16, [(48, 768, 330), (48, 512, 60)], [(48, 768, 330), (48, 512, 60)]),
    ("LLaVA-1.5-7B, seven kinds of layer", 64, [(192, 4096, 900), (32, 11008, 2200)], [(4, 4096, 900)]),
    ("its q, k, v, o, bases of odd width", 64, [(128, 4096, 899)], []),
]


def label_of(label: str, rank: int, groups: list[tuple[int, int, int]]) -> str:
    """A case's name behind that of its op."""
    return f"{label}, r {rank}: " + ", ".join(f"{n} x [{d}, <= {k}]" for n, d, k in groups)


def inputs(rank: int, groups: list[tuple[int, int, int]], device: torch.device) -> tuple[Any, ...]:
    """Ragged gradients and bases, the same padded with zeros to one shape per width for batches, and graphs."""
    g, q, padded = [], [], []
    for count, d, k in groups:
        # Ranks differ between layers; the padded version has to take the largest.
        ranks = [max(1, k * (3 + i % 3) // 5) for i in range(count)]
        frame = torch.linalg.qr(torch.randn(d, max(ranks), device=device)).Q
        bases = [frame[:, :r].contiguous() for r in ranks]
        rows = [torch.randn(rank, d, device=device) for _ in ranks]
        wide = [torch.nn.functional.pad(basis, (0, max(ranks) - basis.shape[1])) for basis in bases]
        padded.append((torch.stack(rows), torch.stack(wide)))
        g += rows
        q += bases
    return g, q, padded, {}


def ours(g: list[Tensor], q: list[Tensor], padded: Any, graphs: Any) -> Any:
    return project_rows(g, q)


def loop(g: list[Tensor], q: list[Tensor], padded: Any, graphs: Any) -> Any:
    done = []
    for rows, basis in zip(g, q, strict=True):
        left = rows
        for _ in range(2):
            left = torch.addmm(left, left @ basis, basis.T, alpha=-1)
        done.append((left, (left @ basis).norm() / left.norm()))
    return done


def padded_bmm(g: list[Tensor], q: list[Tensor], padded: list[tuple[Tensor, Tensor]], graphs: Any) -> Any:
    """Given its inputs already padded: the padding itself is not timed."""
    done = []
    for rows, basis in padded:
        left = rows
        for _ in range(2):
            left = torch.baddbmm(left, left @ basis, basis.mT, alpha=-1)
        done.append((left, torch.linalg.matrix_norm(left @ basis) / torch.linalg.matrix_norm(left)))
    return done


def read_and_write(g: list[Tensor], q: list[Tensor], padded: Any, graphs: Any) -> Any:
    """The ceiling: read Q once, read G and write it once."""
    return [basis.sum() for basis in q], [rows.clone() for rows in g]


def cases() -> Iterator[Case]:
    gpu_here = torch.cuda.is_available()
    providers: dict[str, Callable[..., Any]] = {"keeplora": ours}
    if gpu_here:
        providers["keeplora, CUDA graph"] = in_graph(ours)
    providers |= {"loop": loop, "padded bmm": padded_bmm}
    if gpu_here:
        providers["padded bmm, CUDA graph"] = in_graph(padded_bmm)
    providers["padded bmm, torch.compile"] = torch.compile(padded_bmm)
    providers["read Q, copy G (ceiling)"] = read_and_write
    for label, rank, gpu, cpu in MODELS:
        if not (groups := gpu if gpu_here else cpu):
            continue
        sizes = [(d, max(1, k * (3 + i % 3) // 5)) for count, d, k in groups for i in range(count)]
        yield Case(
            id="B4",
            name=f"project_rows / {label_of(label, rank, groups)}",
            setup=partial(inputs, rank, groups),
            providers=providers,
            bytes=sum(4 * d * (k + 2 * rank) for d, k in sizes),
            flops=sum(10 * rank * d * k for d, k in sizes),  # two passes of two products, and the leak's
        )
