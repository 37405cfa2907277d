"""What a benchmark gives to the training loop: a fresh model, tasks, batches, a loss and an accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


class Batches(Protocol):
    """One pass over training data: sized, and iterable once or more."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@runtime_checkable
class Workload(Protocol):
    """A benchmark as the loop sees it. Tasks are counted in learning order; the witness is never trained."""

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the tasks in learning order."""

    @property
    def witness(self) -> str | None:
        """Name of the task that is only ever evaluated, or None."""

    def fingerprint(self) -> str:
        """A short text that changes when the data or the pretrained model change."""

    def model(self) -> nn.Module:
        """A fresh copy of the pretrained model, the same every time."""

    def batches(self, task: int, batch_size: int, seed: int) -> Batches:
        """One training pass in an order that ``seed`` alone decides."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of one batch, a scalar."""

    def accuracy(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> float:
        """Fraction of right answers on ``split`` of a task (None: the witness), in [0, 1]."""


@runtime_checkable
class ItemWorkload(Workload, Protocol):
    """A workload that also tells which items a model gets right: what paired tests between methods need."""

    def correct(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> Tensor:
        """Which items of ``split`` are answered right: bool [n], always in the order of the split.

        Their share is [`accuracy`][].
        """
