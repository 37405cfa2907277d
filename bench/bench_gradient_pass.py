"""B1: the gradient pass before a task and the adapters made of it, against all gradients copied to the CPU."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench import reference
from bench.clip import Clip, Size, adapted, pairs_loss
from bench.harness import Case
from keeplora.lora import LoraSlot, linear_targets, select_targets, unwrap, wrap
from keeplora.math.lowrank import top_directions
from keeplora.statistics import mean_gradients, sketch_widths

RANK = 16
PROTECTED = 0.25  # of each layer's inputs
GPU = Size(), 64, 4
CPU = Size(image=128, width=384, blocks=4, text_width=256, text_blocks=2, text_length=16, vocabulary=1000), 8, 2

Inputs = tuple[nn.Module, list[str], list[tuple[Tensor, Tensor]], list[Tensor]]


def inputs(size: Size, batch: int, batches: int, device: torch.device) -> Inputs:
    """A model, its adapted layers, a task's data and the layers' protected bases."""
    torch.manual_seed(0)
    model = Clip(size).eval().to(device)
    data = [
        (
            torch.randn(batch, 3, size.image, size.image, device=device),
            torch.randint(size.vocabulary, (batch, size.text_length), device=device),
        )
        for _ in range(batches)
    ]
    names = adapted(model)
    widths = [model.get_parameter(f"{name}.weight").shape[1] for name in names]
    bases = [torch.linalg.qr(torch.randn(d, int(PROTECTED * d), device=device)).Q for d in widths]
    return model, names, data, bases


def ours(model: nn.Module, names: list[str], data: list, bases: list[Tensor], kind: str = "exact") -> list[Tensor]:
    slots: list[LoraSlot] = wrap(model, select_targets(linear_targets(model), names))
    try:
        widths = sketch_widths(slots, RANK, kind=kind)
        gradients = mean_gradients(model, slots, data, pairs_loss, keep=widths)
    finally:
        unwrap(model)
    return [found.a for found in top_directions(gradients, bases, RANK)]


def ours_sketched(model: nn.Module, names: list[str], data: list, bases: list[Tensor]) -> list[Tensor]:
    return ours(model, names, data, bases, "sketch")


def public(model: nn.Module, names: list[str], data: list, bases: list[Tensor]) -> list[Tensor]:
    gradients = reference.mean_gradients(model, data, pairs_loss)
    return [
        reference.directions(gradients[f"{name}.weight"], q.cpu(), RANK).to(q.device)
        for name, q in zip(names, bases, strict=True)
    ]


def cases() -> Iterator[Case]:
    size, batch, batches = GPU if torch.cuda.is_available() else CPU
    model = f"vision {size.blocks} x {size.width}, text {size.text_blocks} x {size.text_width}"
    yield Case(
        id="B1",
        name=f"gradient pass / CLIP, {model}, {size.image}/{size.patch} / {batches} batches of {batch}, rank {RANK}",
        setup=lambda device: inputs(size, batch, batches, device),
        providers={
            "keeplora": ours,
            "keeplora, row sketches": ours_sketched,
            "all gradients to the CPU, svd_lowrank (public code)": public,
        },
    )
