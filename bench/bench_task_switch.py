"""B9: a whole task switch, before_task and after_task with their data passes, against the public procedure."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench import reference
from bench.clip import ATTENTION, ImageTower, Size, adapted, class_loss, give_decaying_spectra
from bench.harness import Case
from keeplora import KeepLora, KeepLoraConfig

# The published settings of the vision tower.
CONFIG = KeepLoraConfig(r=16, alpha=1.0, target_modules=ATTENTION, weight_energy=0.85, feature_energy=0.99)
# Blocks, images of a batch (64 in the published runs), batches. Time of either side is proportional to the blocks.
GPU, CPU, SMALL = (2, 64, 4), (1, 64, 1), (1, 2, 1)
CLASSES = 100


def inputs(learned: bool, blocks: int, batch: int, batches: int, device: torch.device) -> tuple[Any, ...]:
    """A model, a task's data and, where a task was learned before, the keeper and the bases it left."""
    torch.manual_seed(0)
    model = ImageTower(Size(blocks=blocks, joint=CLASSES)).eval().to(device)
    give_decaying_spectra(model)

    def task() -> list[tuple[Tensor, Tensor]]:
        images = torch.randn(batches, batch, 3, 224, 224, device=device)
        return list(zip(images, torch.randint(CLASSES, (batches, batch), device=device), strict=True))

    if not learned:
        return model, task(), None, None
    keeper = KeepLora(copy.deepcopy(model), CONFIG)
    first = task()
    keeper.before_task(first, class_loss)
    keeper.after_task(first)
    return model, task(), keeper, [keeper.basis(name) for name in adapted(model)]


def ours(model: nn.Module, data: list, keeper: KeepLora | None, bases: list[Tensor] | None) -> Any:
    keeper = copy.deepcopy(keeper) if keeper else KeepLora(model, CONFIG)
    keeper.before_task(data, class_loss)
    certificate = keeper.after_task(data)
    keeper.merge()
    return certificate


def public(model: nn.Module, data: list, keeper: KeepLora | None, bases: list[Tensor] | None) -> list[Tensor]:
    names = adapted(model)
    weights = [model.get_parameter(f"{name}.weight") for name in names]
    if bases is None:
        bases = [reference.weight_basis(weight.detach(), 0.85) for weight in weights]
    gradients = reference.mean_gradients(model, data, class_loss)
    rows = [
        reference.directions(gradients[f"{name}.weight"], q.cpu(), CONFIG.r).to(q.device)
        for name, q in zip(names, bases, strict=True)
    ]
    with torch.no_grad():
        for weight, a in zip(weights, rows, strict=True):
            weight += CONFIG.scaling * weight.new_zeros(len(weight), CONFIG.r) @ a  # B, before it has learned
    inputs_of = reference.features(model, names, data, class_loss)
    return [reference.extended_basis(x, q, 0.99) for x, q in zip(inputs_of, bases, strict=True)]


def cases() -> Iterator[Case]:
    blocks, batch, batches = GPU if torch.cuda.is_available() else CPU
    for label, learned in (("first task", False), ("later task", True)):
        yield Case(
            id="B9",
            name=f"task switch / {label}, ViT-B/16 with {blocks} block(s) / {batches} batch(es) of {batch}",
            setup=lambda device, learned=learned: inputs(learned, blocks, batch, batches, device),
            providers={"keeplora": ours, "public code": public},
            small=lambda device, learned=learned: inputs(learned, *SMALL, device),
        )
