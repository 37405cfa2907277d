"""What a benchmark gives to the training loop: a fresh model, tasks, batches, a loss and an accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


class Batches(Protocol):
    """One pass over training data: sized, and iterable once or more."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class ModelOrigin:
    """Where a pretrained model comes from, in the words of the Hub's model cards.

    Attributes:
        library: What loads it: ``"open_clip"`` or ``"transformers"``.
        name: Its id on the Hub, its folder, or its name in the library.
        scored: What it is evaluated at, as the Hub names tasks.
    """

    library: str
    name: str
    scored: str


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
class EvenlyWorkload(Workload, Protocol):
    """A workload that also gives a share of a task's training samples, evenly spaced in the order of its files."""

    def evenly(self, task: int, batch_size: int, seed: int, share: float) -> Batches:
        """A pass over `max(1, round(share · n))` of the n samples, number `floor(i · n / k)` for i < k."""


@runtime_checkable
class ItemWorkload(Workload, Protocol):
    """A workload that also tells which items a model gets right: what paired tests between methods need."""

    def correct(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> Tensor:
        """Which items of ``split`` are answered right: bool [n], always in the order of the split.

        Their share is [`accuracy`][].
        """
