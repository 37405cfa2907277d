"""B10: time and memory of a switch's parts as layers, widths and tokens grow, beside as much plain arithmetic.

How the measured growth compares with the counted one: ``python -m bench.plot_scaling FILE`` on what bench.run wrote.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Case
from bench.team import Team
from keeplora.distributed import processes
from keeplora.lora import linear_targets, unwrap, wrap
from keeplora.math.batch import BATCH_BYTES, LARGEST_BATCHED
from keeplora.math.factorise import plan_for
from keeplora.math.lowrank import STEPS, extend_basis, top_directions
from keeplora.statistics import feature_statistics, mean_gradients

RANK = 16
THRESHOLD = 0.99
BATCH = 1024  # tokens
PROBE = 2048  # width of the products that show what the machine can do
SHARED = 1 << 16  # tokens that processes share out among themselves
# What grows, and what stays as it is meanwhile.
GPU: dict[str, tuple[int, ...]] = {
    "layers": (12, 24, 48, 96, 224),
    "width": (512, 1024, 2048, 4096, 8192),
    "tokens": (1 << 10, 1 << 13, 1 << 16, 1 << 20),
}
CPU: dict[str, tuple[int, ...]] = {
    "layers": (12, 24, 48, 96, 224),
    "width": (256, 512, 1024, 2048, 4096, 8192),
    "tokens": (1 << 10, 1 << 13, 1 << 16, 1 << 20),
    "processes": (1, 2, 4, 8),  # a group on one GPU would only queue
}
FIXED = {"cpu": {"layers": 4, "width": 256}, "cuda": {"layers": 12, "width": 768}}


@dataclass(frozen=True)
class Count:
    """Arithmetic and memory by formula."""

    flops: int
    bytes: int


def sizes(axis: str, value: int, kind: str) -> tuple[int, int, int]:
    """Layers, width and tokens of one point; the tokens of all processes."""
    if axis == "tokens":
        return 1, FIXED[kind]["width"], value
    if axis == "processes":
        return 1, FIXED[kind]["width"], SHARED
    if axis == "width":
        return 1, value, 0
    return value, FIXED[kind]["width"], 0


def count(axis: str, value: int, kind: str, cores: int = 1) -> Count:
    """What a point needs; of several processes, what the busiest core and one process do."""
    layers, d, tokens = sizes(axis, value, kind)
    return need(layers, d, tokens // (min(value, cores) if axis == "processes" else 1), kind)


def need(layers: int, d: int, tokens: int, kind: str) -> Count:
    """What the passes need, or without tokens the decompositions, from their formulas."""
    if tokens:
        # Forward and gradient, forward and second moment: four products. Both d x d sums, and what a batch needs.
        return Count(8 * tokens * d * d, 2 * 4 * d * d + 4 * 4 * BATCH * d)
    free, plan = d - protected(d), plan_for(kind)
    krylov = 4 * d * d * RANK * (STEPS + 1)
    # Eigenvectors of a symmetric matrix: 9 n^3 (Golub & Van Loan); the matrix itself: two products with the frame, or
    # three with the basis. Above, blocks of the about 100 directions that are found, an orthonormalisation and two
    # products each time.
    iterated, shifted = free >= plan.iterative_from, d < plan.qr_from
    exact = 9 * d**3 + 6 * d * d * protected(d) if shifted else 9 * free**3 + 4 * d * d * free
    basis = 20 * d * d * 100 if iterated else exact
    # Kept for every layer: the basis and the adapter; for those worked on at once: three d x d matrices in float64,
    # or two in float32 where blocks of directions do.
    work = (2 * 4 if iterated else 3 * 8) * d * d
    batched = kind == "cuda" and d * d <= LARGEST_BATCHED and not iterated
    together = min(layers, BATCH_BYTES // (8 * d * d)) if batched else 1
    return Count(layers * (krylov + basis), layers * 4 * d * (protected(d) + 2 * RANK) + together * work)


def protected(d: int) -> int:
    return d // 4


def finalize_inputs(layers: int, d: int, device: torch.device) -> tuple[Any, ...]:
    """Gradients, second moments with energies ~ 1/i^2 and bases that hold their leading part."""
    generator = torch.Generator(device).manual_seed(0)
    scale = 1.0 / torch.arange(1, d + 1, device=device)
    frame = torch.linalg.qr(torch.randn(d, d, generator=generator, device=device)).Q
    other = torch.linalg.qr(torch.randn(d, d, generator=generator, device=device)).Q
    g = (other * scale) @ frame.T
    c = (other * scale.square()) @ other.T
    q = frame[:, : protected(d)].contiguous()
    return [g] * layers, [(c + c.T) / 2] * layers, [q] * layers


def finalize(g: list[Tensor], c: list[Tensor], q: list[Tensor]) -> Any:
    return top_directions(g, q, RANK), extend_basis(q, c, THRESHOLD)


def pass_inputs(tokens: int, d: int, device: torch.device) -> tuple[Any, ...]:
    """A layer and as many batches as make up the tokens: one tensor again and again, so that data take no memory."""
    generator = torch.Generator(device).manual_seed(0)
    model = nn.Sequential(nn.Linear(d, d)).to(device)
    return model, [torch.randn(BATCH, d, generator=generator, device=device)] * (tokens // BATCH)


def passes(model: nn.Module, data: list[Tensor]) -> Any:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    slots, peers = wrap(model, linear_targets(model)), processes()
    try:
        return (
            mean_gradients(model, slots, data, loss, peers=peers),
            feature_statistics(model, slots, data, loss, peers=peers),
        )
    finally:
        unwrap(model)


def sizes_of(first: Any, second: list[Tensor], *_: Any) -> tuple[int, int, int]:
    """Layers, width and tokens of a call's arguments."""
    d = second[0].shape[1]
    return (1, d, len(second) * BATCH) if isinstance(first, nn.Module) else (len(second), d, 0)


def team(size: int, tokens: int, d: int) -> tuple[Team]:
    """Processes that share out the tokens."""
    return (Team(size, partial(pass_inputs, tokens // size, d, torch.device("cpu")), passes),)


def products(flops: int, device: torch.device) -> None:
    """As many float operations in plain matrix products."""
    side = min(PROBE, max(64, round((flops / 2) ** (1 / 3))))
    a = torch.ones(side, side, device=device)
    out = torch.empty_like(a)
    for _ in range(max(1, round(flops / (2 * side**3)))):
        torch.mm(a, a, out=out)


def cases() -> Iterator[Case]:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    for axis, values in (GPU if kind == "cuda" else CPU).items():
        for value in values:
            yield case(axis, value, kind)


def case(axis: str, value: int, kind: str) -> Case:
    """One point of an axis."""
    layers, d, tokens = sizes(axis, value, kind)
    flops = count(axis, value, kind, os.cpu_count() or 1).flops
    what = f"statistics, width {d}" if tokens else "top_directions and extend_basis"
    held = f", width {d}" if axis == "layers" else f", {tokens} tokens" if axis == "processes" else ""
    name, against = f"scaling / {what}{held} / {axis} = {value}", "ceiling: products with the counted arithmetic"
    if axis == "processes":
        return Case(
            id="B10",
            name=name,
            setup=lambda device: team(value, tokens, d),
            small=lambda device: team(min(value, 2), 2 * BATCH, 32),
            providers={"keeplora": Team.call, against: lambda _: products(flops, torch.device(kind))},
            memory={"keeplora": Team.peak_bytes},
            flops=flops,
        )
    return Case(
        id="B10",
        name=name,
        setup=lambda device: pass_inputs(tokens, d, device) if tokens else finalize_inputs(layers, d, device),
        small=lambda device: pass_inputs(BATCH, 32, device) if tokens else finalize_inputs(min(layers, 2), 32, device),
        providers={
            "keeplora": passes if tokens else finalize,
            against: lambda *given: products(need(*sizes_of(*given), kind).flops, torch.device(kind)),
        },
        flops=flops,
    )
