"""What workloads have in common whose tasks are dataclasses of tensors: names, a witness, a device, a fingerprint."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["TaskSequence"]


class _Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=_Named)


class TaskSequence(ABC, Generic[T]):
    """Tasks in learning order and, where there is one, the witness; their tensors are kept on ``device``.

    A task is a frozen dataclass with a name, whose fields are tensors, splits (dataclasses of tensors) or plain values.
    """

    def __init__(self, tasks: Sequence[T], witness: T | None, *, device: str = "cpu") -> None:
        self._tasks: list[T] = [_moved(task, device) for task in tasks]
        self._witness: T | None = None if witness is None else _moved(witness, device)

    @property
    def tasks(self) -> Sequence[str]:
        """Names in learning order."""
        return [task.name for task in self._tasks]

    @property
    def witness(self) -> str | None:
        """Name of the task that is never trained."""
        return None if self._witness is None else self._witness.name

    def fingerprint(self) -> str:
        """Hash of all tasks' data, labels and texts, and of the pretrained weights."""
        digest = hashlib.sha256()
        for task in [*self._tasks, *([] if self._witness is None else [self._witness])]:
            digest.update(task.name.encode())
            for tensor in _tensors(task):
                digest.update(_bytes(tensor))
        for name, weight in self.model().state_dict().items():
            digest.update(name.encode())
            digest.update(_bytes(weight))
        return digest.hexdigest()[:16]

    def contents(self, task: int | None, split: str) -> str:
        """Hash of what evaluating a split depends on besides the model: its data in their order, labels and texts."""
        chosen: Any = self.task(task)
        values = {field.name: getattr(chosen, field.name) for field in fields(chosen)}
        digest = hashlib.sha256(f"{type(self).__module__}.{type(self).__qualname__}\n".encode())
        for name, value in values.items():
            if is_dataclass(value) and split in values and name != split:
                continue  # another split
            tensors = _tensors(value) if is_dataclass(value) else [value] if isinstance(value, Tensor) else []
            digest.update(f"{name} {'' if is_dataclass(value) or isinstance(value, Tensor) else value!r}\n".encode())
            for tensor in tensors:
                digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(_bytes(tensor))
        return digest.hexdigest()

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh copy of the pretrained model, the same every time."""

    def task(self, index: int | None) -> T:
        """The task with this place in the order; None means the witness."""
        chosen = self._witness if index is None else self._tasks[index]
        assert chosen is not None
        return chosen


def _tensors(item: Any) -> Iterator[Tensor]:
    """Those of the splits, then the item's own."""
    values = [getattr(item, field.name) for field in fields(item)]
    for value in values:
        if is_dataclass(value):
            yield from _tensors(value)
    yield from (value for value in values if isinstance(value, Tensor))


def _moved(item: Any, device: str) -> Any:
    changes: dict[str, Any] = {}
    for field in fields(item):
        value = getattr(item, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = value.to(device)
        elif is_dataclass(value):
            changes[field.name] = _moved(value, device)
    return replace(item, **changes)


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
