"""What the four examples share: a model, two small tasks, a keeper, and the table they print.

Batches come in an order that is fixed beforehand, so that the loops differ in nothing but the library that drives them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import keeplora
from keeplora.tasks import Batch, Split, Task, accuracy, classification_loss
from keeplora.tasks.embedded import load_model, load_tasks

NAMES = ("digits", "greek")
BATCH, STEPS, TEST = 32, 12, 200
LEARNING_RATE, WEIGHT_DECAY = 5e-3, 0.01


class Classifier(nn.Module):
    """An open_clip model whose forward returns the loss.

    Trainer, and the mixed precision of Accelerate, look at ``forward``; open_clip's own returns features.
    """

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, labels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return {"loss": classification_loss(self.clip, Batch(images, labels, tokens))}


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of the keeper's own passes; ``model`` is the open_clip model it was made for."""
    return classification_loss(model, Batch(**batch))


def make_keeper() -> keeplora.KeepLora:
    """KeepLoRA around a fresh copy of the pretrained model."""
    config = keeplora.KeepLoraConfig(r=8, alpha=8, target_modules=["v_proj", "out_proj"])
    return keeplora.KeepLora(load_model(), config)


@cache
def small_tasks() -> tuple[Task, ...]:
    """Two tasks of the embedded benchmark, cut to what a few seconds are enough for."""
    return tuple(
        replace(task, train=_drawn(task.train, BATCH * STEPS), test=_drawn(task.test, TEST))
        for task in load_tasks(NAMES)[0]
    )


def samples(task: Task) -> list[dict[str, Tensor]]:
    """The training images as a data set."""
    return [{"images": image, "labels": label} for image, label in zip(*vars(task.train).values(), strict=True)]


def collate(task: Task) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:
    """Samples to a batch, with the tokens of all the task's classes."""

    def together(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {"tokens": task.tokens}

    return together


def batches(task: Task) -> DataLoader[dict[str, Tensor]]:
    """The training batches, always in the same order."""
    return DataLoader(samples(task), batch_size=BATCH, collate_fn=collate(task))  # type: ignore[arg-type]


def accuracies(clip: nn.Module) -> list[float]:
    """Accuracy on the test images of every task, in percent."""
    return [accuracy(clip, task) for task in small_tasks()]


def table(rows: list[list[float]]) -> str:
    """``rows[i][j]``: accuracy on task j after i tasks."""
    names = ["zero-shot", *(f"after {name}" for name in NAMES)]
    lines = [f"{'accuracy, %':14}" + "".join(f"{name:>8}" for name in NAMES)]
    lines += [f"{name:14}" + "".join(f"{value:8.1f}" for value in row) for name, row in zip(names, rows, strict=True)]
    return "\n".join(lines)


def _drawn(split: Split, count: int) -> Split:
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:count]
    return Split(split.images[chosen], split.labels[chosen])
