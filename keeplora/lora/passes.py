"""What every pass over a task's data has in common: a model in eval() that is left as it was, and observers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from .adapter import LoraHost, Observer, Tap

__all__ = ["ALONE", "Peers", "evaluating", "first_batches", "frozen", "observing", "tapping"]


T = TypeVar("T")


class Peers(Protocol):
    """The processes that run the same pass, each over its own share of the data."""

    def together(self) -> AbstractContextManager[None]:
        """A block that all get through, or in which all raise."""

    def gather(self, value: T) -> list[T]:
        """What every process gave, in one order everywhere."""

    def add(self, tensor: Tensor) -> None:
        """Add up ``tensor`` over all processes, in place."""


class _Alone:
    """No other process."""

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def gather(self, value: T) -> list[T]:
        return [value]

    def add(self, tensor: Tensor) -> None:
        pass


ALONE: Peers = _Alone()


@contextmanager
def observing(hosts: Sequence[LoraHost], observer: Observer) -> Iterator[None]:
    for host in hosts:
        host.observer = observer
    try:
        yield
    finally:
        for host in hosts:
            host.observer = None


@contextmanager
def tapping(hosts: Sequence[LoraHost], tap: Tap) -> Iterator[None]:
    for host in hosts:
        host.tap = tap
    try:
        yield
    finally:
        for host in hosts:
            host.tap = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval() with every module's own mode restored: dropout and batch statistics must not enter, nor change."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient; every flag is restored."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def first_batches(loader: Iterable[Any], fraction: float) -> Iterable[Any]:
    """The first ``fraction`` of the loader's batches, at least one.

    Raises:
        TypeError: ``fraction`` is below 1 and the loader has no length.
    """
    if fraction == 1:
        return loader
    if not isinstance(loader, Sized):
        raise TypeError(
            f"first_batches: loader must have a length for data_fraction = {fraction}, got {type(loader).__name__}. "
            "Set data_fraction to 1 and pass fewer batches."
        )
    return _First(loader, max(1, round(len(loader) * fraction)))


@dataclass(frozen=True)
class _First:
    """A loader's first ``count`` batches; it has a length, as the loader does."""

    loader: Iterable[Any]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.count)
