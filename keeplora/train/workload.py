"""What a benchmark gives to the training loop: a fresh model, tasks, batches, a loss and an accuracy."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from keeplora.train.config import ConfigError, suggest


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


def load_workload(name: str, device: str = "cpu") -> Workload:
    """The benchmark called ``name``: one of :data:`BENCHMARKS`, or ``"package.module:function"``.

    A function outside the package is called with the device and returns a :class:`Workload`.
    Raises :class:`~keeplora.train.config.ConfigError` for a name that leads nowhere.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name](device)
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(
            f"load_workload: benchmark must be one of {', '.join(BENCHMARKS)} or 'package.module:function', "
            f"got {name!r}{suggest(name, BENCHMARKS)}"
        )
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"load_workload: benchmark {name!r} must be importable: {error}") from error
    workload = factory(device)
    if not isinstance(workload, Workload):
        raise ConfigError(f"load_workload: {name!r} must return a Workload, got {type(workload).__name__}")
    return workload


def _embedded(device: str) -> Workload:
    from keeplora.train.classification import embedded_workload

    return embedded_workload(device)


BENCHMARKS: dict[str, Callable[[str], Workload]] = {"embedded": _embedded}
"""Benchmarks by name; each is built for a device."""
