"""B5: projected_adamw over all trained A of a model, against a loop and zero-padded batches with a fused Adam."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.bench_project_rows import MODELS, inputs, label_of
from bench.graphs import in_graph
from bench.harness import Case
from keeplora.ops import projected_adamw

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01


def state(rank: int, groups: list[tuple[int, int, int]], device: torch.device) -> tuple[Any, ...]:
    """Ragged parameters, gradients and moments, and the same padded with zeros to one shape per width."""
    a, q, padded, graphs = inputs(rank, groups, device)
    ragged = (a, [torch.randn_like(m) for m in a], [torch.zeros_like(m) for m in a], [torch.zeros_like(m) for m in a])
    batches = [
        (rows, torch.randn_like(rows), torch.zeros_like(rows), torch.zeros_like(rows), basis) for rows, basis in padded
    ]
    return *ragged, q, batches, graphs


def ours(a: Any, grad: Any, m: Any, v: Any, q: Any, batches: Any, graphs: Any) -> Any:
    return projected_adamw(a, grad, m, v, q, step=10, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


def adam(a: list[Tensor], grad: list[Tensor], m: list[Tensor], v: list[Tensor]) -> None:
    """torch's own fused AdamW on all parameters at once."""
    step = [torch.full((), 10.0, device=a[0].device) for _ in a]
    torch._fused_adamw_(
        a, grad, m, v, [], step, lr=LR, beta1=BETAS[0], beta2=BETAS[1], weight_decay=DECAY, eps=EPS, amsgrad=False,
        maximize=False,
    )  # fmt: skip


def without(rows: Tensor, basis: Tensor) -> Tensor:
    return torch.addmm(rows, rows @ basis, basis.T, alpha=-1)


def loop(a: Any, grad: Any, m: Any, v: Any, q: Any, batches: Any, graphs: Any) -> Any:
    projected = [without(g, basis) for g, basis in zip(grad, q, strict=True)]
    adam(a, projected, m, v)
    leaks = []
    for rows, basis in zip(a, q, strict=True):
        rows.copy_(without(without(rows, basis), basis))
        leaks.append((rows @ basis).norm() / rows.norm())
    return leaks


def batch_without(rows: Tensor, basis: Tensor) -> Tensor:
    return torch.baddbmm(rows, rows @ basis, basis.mT, alpha=-1)


def padded_bmm(a: Any, grad: Any, m: Any, v: Any, q: Any, batches: Any, graphs: Any) -> Any:
    """Given its inputs already padded: the padding itself is not timed."""
    projected = [batch_without(g, basis) for _, g, _, _, basis in batches]
    adam([b[0] for b in batches], projected, [b[2] for b in batches], [b[3] for b in batches])
    leaks = []
    for rows, _, _, _, basis in batches:
        rows.copy_(batch_without(batch_without(rows, basis), basis))
        leaks.append(torch.linalg.matrix_norm(rows @ basis) / torch.linalg.matrix_norm(rows))
    return leaks


def read_and_write(a: Any, grad: Any, m: Any, v: Any, q: Any, batches: Any, graphs: Any) -> Any:
    """The ceiling: read Q and the gradient once, read and write the rest once."""
    return [basis.sum() for basis in q], [g.sum() for g in grad], [x.clone() for x in (*a, *m, *v)]


def cases() -> Iterator[Case]:
    gpu_here = torch.cuda.is_available()
    providers: dict[str, Callable[..., Any]] = {"keeplora": ours}
    if gpu_here:
        providers["keeplora, CUDA graph"] = in_graph(ours)
    providers |= {"loop + fused AdamW": loop, "padded bmm + fused AdamW": padded_bmm}
    if gpu_here:
        providers["padded bmm + fused AdamW, CUDA graph"] = in_graph(padded_bmm)
    providers["read Q, copy A m v (ceiling)"] = read_and_write
    for label, rank, gpu, cpu in MODELS:
        if not (groups := gpu if gpu_here else cpu):
            continue
        sizes = [(d, max(1, k * (3 + i % 3) // 5)) for count, d, k in groups for i in range(count)]
        yield Case(
            id="B5",
            name=f"projected_adamw / {label_of(label, rank, groups)}",
            setup=partial(state, rank, groups),
            providers=providers,
            bytes=sum(4 * d * (k + 7 * rank) for d, k in sizes),
            flops=sum(14 * rank * d * k for d, k in sizes),
        )
