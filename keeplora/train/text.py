"""The text benchmark as a workload."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.tasks.text import (
    TextBatch,
    TextSplit,
    TextTask,
    accuracy,
    classification_loss,
    load_encoder,
    load_tasks,
    shuffled,
)
from keeplora.train.workload import Batches


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


class TextWorkload:
    """A sequence of text tasks and the sentence encoder that learns it."""

    def __init__(self, tasks: Sequence[TextTask], witness: TextTask | None, *, device: str = "cpu") -> None:
        self._tasks = [_moved(task, device) for task in tasks]
        self._witness = None if witness is None else _moved(witness, device)

    @property
    def tasks(self) -> Sequence[str]:
        """Names in learning order."""
        return [task.name for task in self._tasks]

    @property
    def witness(self) -> str | None:
        """Name of the task that is never trained."""
        return None if self._witness is None else self._witness.name

    def fingerprint(self) -> str:
        """Hash of all tokens, labels and pretrained weights."""
        digest = hashlib.sha256()
        for task in [*self._tasks, *([] if self._witness is None else [self._witness])]:
            digest.update(task.name.encode())
            for split in (task.train, task.validation, task.test):
                digest.update(split.tokens.cpu().numpy().tobytes())
                digest.update(split.labels.cpu().numpy().tobytes())
            digest.update(task.names.cpu().numpy().tobytes())
        for name, weight in self.model().state_dict().items():
            digest.update(name.encode())
            digest.update(weight.numpy().tobytes())
        return digest.hexdigest()[:16]

    def model(self) -> nn.Module:
        """A fresh copy of the pretrained encoder."""
        return load_encoder()

    def batches(self, task: int, batch_size: int, seed: int) -> Batches:
        """One shuffled pass over the training split."""
        chosen = self._tasks[task]
        return _Pass(chosen.train, chosen.names, batch_size, seed)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy over the classes' names."""
        return classification_loss(model, batch)

    def accuracy(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> float:
        """Fraction of definitions whose nearest class name is their own."""
        chosen = self._witness if task is None else self._tasks[task]
        assert chosen is not None
        return accuracy(model, chosen, split, batch_size=batch_size)


_SMALL_TASKS, _EVERY = 4, 2


def minilm_workload(device: str, *, small: bool = False) -> TextWorkload:
    """WordNet's definitions for all-MiniLM-L6-v2. ``small``: the first four tasks, every second text to evaluate."""
    tasks, witness = load_tasks()
    if small:
        tasks, witness = [_small(task) for task in tasks[:_SMALL_TASKS]], _small(witness)
    return TextWorkload(tasks, witness, device=device)


def _small(task: TextTask) -> TextTask:
    def thinned(split: TextSplit) -> TextSplit:
        return TextSplit(split.tokens[::_EVERY], split.labels[::_EVERY])

    return replace(task, validation=thinned(task.validation), test=thinned(task.test))


def _moved(task: TextTask, device: str) -> TextTask:
    target = torch.device(device)

    def moved(split: TextSplit) -> TextSplit:
        return TextSplit(split.tokens.to(target), split.labels.to(target))

    return replace(
        task,
        names=task.names.to(target),
        train=moved(task.train),
        validation=moved(task.validation),
        test=moved(task.test),
    )
