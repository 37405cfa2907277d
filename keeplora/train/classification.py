"""Classification tasks as a workload; the embedded benchmark is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from keeplora.tasks.base import Split, SplitName, Task, accuracy, classification_loss, loader
from keeplora.train.sequence import TaskSequence
from keeplora.train.workload import Batches


class ClassificationWorkload(TaskSequence[Task]):
    """A sequence of :class:`~keeplora.tasks.base.Task` and the model that learns it.

    ``make_model`` returns a fresh model; the images of all tasks are kept on ``device``.
    """

    def __init__(
        self, tasks: Sequence[Task], witness: Task | None, make_model: Callable[[], nn.Module], *, device: str = "cpu"
    ) -> None:
        super().__init__(tasks, witness, device=device)
        self._make_model = make_model

    def model(self) -> nn.Module:
        """A fresh copy of the pretrained model."""
        return self._make_model()

    def batches(self, task: int, batch_size: int, seed: int) -> Batches:
        """One shuffled pass over the training split."""
        chosen = self.task(task)
        return loader(chosen.train, chosen.tokens, batch_size, seed=seed)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy over the classes' texts."""
        return classification_loss(model, batch)

    def accuracy(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> float:
        """Fraction of images whose nearest class text is their own."""
        return accuracy(model, self.task(task), cast(SplitName, split), batch_size=batch_size) / 100


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


def _small(task: Task) -> Task:
    def thinned(split: Split) -> Split:
        every = -(-len(split) // _SMALL_IMAGES)
        return Split(split.images[::every], split.labels[::every])

    return replace(task, validation=thinned(task.validation), test=thinned(task.test))
