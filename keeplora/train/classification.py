"""Classification tasks as a workload; the embedded benchmark is one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from keeplora.tasks.base import Split, SplitName, Task, accuracy, classification_loss, loader
from keeplora.train.workload import Batches


class ClassificationWorkload:
    """A sequence of :class:`~keeplora.tasks.base.Task` and the model that learns it.

    ``make_model`` returns a fresh model; the images of all tasks are kept on ``device``.
    """

    def __init__(
        self, tasks: Sequence[Task], witness: Task | None, make_model: Callable[[], nn.Module], *, device: str = "cpu"
    ) -> None:
        self._tasks = [_moved(task, device) for task in tasks]
        self._witness = None if witness is None else _moved(witness, device)
        self._make_model = make_model

    @property
    def tasks(self) -> Sequence[str]:
        """Names in learning order."""
        return [task.name for task in self._tasks]

    @property
    def witness(self) -> str | None:
        """Name of the task that is never trained."""
        return None if self._witness is None else self._witness.name

    def fingerprint(self) -> str:
        """Hash of all images, labels, texts and pretrained weights."""
        digest = hashlib.sha256()
        for task in [*self._tasks, *([] if self._witness is None else [self._witness])]:
            digest.update(task.name.encode())
            for split in (task.train, task.validation, task.test):
                digest.update(_bytes(split.images))
                digest.update(_bytes(split.labels))
            digest.update(_bytes(task.tokens))
        for name, weight in self.model().state_dict().items():
            digest.update(name.encode())
            digest.update(_bytes(weight))
        return digest.hexdigest()[:16]

    def model(self) -> nn.Module:
        """A fresh copy of the pretrained model."""
        return self._make_model()

    def batches(self, task: int, batch_size: int, seed: int) -> Batches:
        """One shuffled pass over the training split."""
        chosen = self._tasks[task]
        return loader(chosen.train, chosen.tokens, batch_size, seed=seed)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy over the classes' texts."""
        return classification_loss(model, batch)

    def accuracy(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> float:
        """Fraction of images whose nearest class text is their own."""
        chosen = self._witness if task is None else self._tasks[task]
        assert chosen is not None
        return accuracy(model, chosen, cast(SplitName, split), batch_size=batch_size) / 100


_SMALL_TASKS, _SMALL_IMAGES = 4, 200


def embedded_workload(device: str, *, small: bool = False) -> ClassificationWorkload:
    """The tasks and the model that are shipped with the package.

    ``small``: the first four tasks, validation and test splits of at most 200 images; for a look within minutes.
    """
    from keeplora.tasks.embedded import load_model, load_tasks

    tasks, witness = load_tasks()
    if small:
        tasks, witness = [_small(task) for task in tasks[:_SMALL_TASKS]], _small(witness)
    return ClassificationWorkload(tasks, witness, load_model, device=device)


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _small(task: Task) -> Task:
    def thinned(split: Split) -> Split:
        every = -(-len(split) // _SMALL_IMAGES)
        return Split(split.images[::every], split.labels[::every])

    return replace(task, validation=thinned(task.validation), test=thinned(task.test))


def _moved(task: Task, device: str) -> Task:
    target = torch.device(device)
    splits = {name: getattr(task, name) for name in ("train", "validation", "test")}
    moved = {name: Split(split.images.to(target), split.labels.to(target)) for name, split in splits.items()}
    return Task(task.name, task.classes, task.prompts, task.tokens.to(target), **moved)
