"""What every pass over a task's data has in common: a model in eval() that is left as it was, and observers."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from keeplora._messages import add_note, warn
from keeplora.lora.host import LoraHost, Observer, Tap
from keeplora.lora.slot import LoraSlot, TokenMask

__all__ = [
    "ALONE",
    "BatchSize",
    "Peers",
    "Samples",
    "batch_size_of",
    "counting",
    "evaluating",
    "first_batches",
    "frozen",
    "naming_batch",
    "observing",
    "rows_that_count",
    "tapping",
    "zeroed",
]


T = TypeVar("T")


class Peers(Protocol):
    """The processes that run the same pass, each over its own share of the data; ``rank`` is this one."""

    rank: int

    def together(self) -> AbstractContextManager[None]:
        """A block that all get through, or in which all raise."""

    def in_step(self) -> AbstractContextManager[None]:
        """A block in the middle of which the others wait for this process."""

    def gather(self, value: T) -> list[T]:
        """What every process gave, in one order everywhere."""

    def add(self, tensor: Tensor) -> None:
        """Add up ``tensor`` over all processes, in place."""


class _Alone:
    """No other process."""

    rank = 0

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def in_step(self) -> AbstractContextManager[None]:
        return nullcontext()

    def gather(self, value: T) -> list[T]:
        return [value]

    def add(self, tensor: Tensor) -> None:
        pass


ALONE: Peers = _Alone()
"""A single process, whose sums are its own."""


def counting(function: str, token_mask: TokenMask | None, slot: LoraSlot, x: Tensor) -> Tensor | None:
    """Which tokens of a layer's input count, ``bool [x.shape[:-1]]`` on its device; None where all do.

    Of experts, which are given some tokens each, the mask is asked about the input of all.

    Raises:
        ValueError: the mask is of another shape or dtype.
    """
    if token_mask is None:
        return None
    source, rows = slot.host.source(slot, x)
    mask = token_mask(slot, source)
    if mask is None:
        return None
    if mask.shape != source.shape[:-1] or mask.dtype != torch.bool:
        raise ValueError(
            f"{function}: token_mask must return bool {list(source.shape[:-1])} or None, got {list(mask.shape)} in "
            f"{mask.dtype} [{slot.name}]"
        )
    return mask.to(x.device) if rows is None else mask.to(x.device)[rows]


def rows_that_count(x: Tensor, mask: Tensor | None, *, in_place: bool = False) -> tuple[Tensor, int | Tensor]:
    """The tokens of ``x`` as rows, and how many count; ``in_place``: every token has its row.

    On a CPU those that count are taken out. Elsewhere their number is known to the device alone, and asking for it
    would hold up the host: the others are rows of zeros, which add nothing to a sum of squares, and the number is a
    tensor.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is None:
        return rows, len(rows)
    keep = mask.reshape(-1)
    if x.device.type == "cpu" and not in_place:
        rows = rows[keep]
        return rows, len(rows)
    return zeroed(rows, keep), keep.sum()


def zeroed(rows: Tensor, keep: Tensor) -> Tensor:
    """Rows with zeros in place of those that do not count, whatever is in these: NaN, too."""
    return torch.where(keep[:, None], rows, rows.new_zeros(()))


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


@contextmanager
def naming_batch(function: str, index: int, batch: Any) -> Iterator[None]:
    """Add to an error of the user's loss function which batch it was given, and what that looked like."""
    try:
        yield
    except Exception as error:
        note = f"{function}: loss_fn(model, batch) failed on batch {index}, which is {_described(batch)}."
        misread = isinstance(error, TypeError | LookupError | AttributeError | ValueError)
        if misread and not _is_ours(error):
            note += " Let loss_fn read batches as the loader yields them, or let the loader yield what loss_fn reads."
        add_note(error, note)
        raise


def _is_ours(error: Exception) -> bool:
    """Whether a layer, a mask or a statistic of ours raised it, with a message that needs no more."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return raised_in.startswith(_OURS)


_OURS = tuple(f"keeplora.{room}." for room in ("ops", "math", "lora", "statistics", "families", "integrations"))


def _described(batch: Any, depth: int = 0) -> str:
    """Type and parts of a batch: ``a tuple of (Tensor [4, 3], Tensor [4])``."""
    if isinstance(batch, Tensor):
        return f"Tensor {list(batch.shape)}"
    kind = type(batch).__name__
    article = "" if depth else "an " if kind[0] in "aeiouAEIOU" else "a "
    if isinstance(batch, Mapping) and depth < 2:
        parts = ", ".join(
            f"{key!r}: {_described(value, depth + 1)}" for key, value in itertools.islice(batch.items(), 8)
        )
        return f"{article}{kind} with {{{parts}}}"
    if isinstance(batch, tuple | list) and depth < 2:
        parts = ", ".join(_described(value, depth + 1) for value in batch[:8])
        return f"{article}{kind} of ({parts})"
    return f"{article}{kind}"


BatchSize = Callable[[Any], int]
"""``batch_size(batch)``: what the batch's loss is a mean over, usually its samples; at least 1."""


def batch_size_of(batch: Any) -> int | None:
    """How many samples a batch has: the leading dimension of the first tensor in it that is not empty.

    Tensors are looked for in tuples, lists, mappings (a ``BatchEncoding``, for one) and dataclasses, in their order and
    however deep; those without a dimension are passed over. None where there is no tensor.

    Examples:
        >>> import torch
        >>> batch_size_of({"scale": torch.tensor(2.0), "inputs": (torch.zeros(8, 3), torch.zeros(9))})
        8
    """
    if isinstance(batch, Tensor):
        return (batch.shape[0] or None) if batch.dim() else None
    parts: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        parts = batch.values()
    elif isinstance(batch, tuple | list):
        parts = batch
    elif is_dataclass(batch):
        parts = (getattr(batch, entry.name) for entry in fields(batch))
    return next((size for size in map(batch_size_of, parts) if size is not None), None)


class Samples:
    """How much each batch of a pass weighs: its samples, relative to the first batch's; 1 where all have one size."""

    def __init__(self, function: str, batch_size: BatchSize | None):
        self.function, self.batch_size = function, batch_size
        self.first = 0
        self.total = 0.0
        self.told = False

    def weigh(self, index: int, batch: Any) -> float:
        size = self.size(index, batch)
        self.first = self.first or size
        weight = size / self.first
        self.total += weight
        return weight

    def size(self, index: int, batch: Any) -> int:
        if self.batch_size is not None:
            given = self.batch_size(batch)
            try:
                size = operator.index(given)
            except TypeError:
                size = 0
            if size < 1:
                raise ValueError(
                    f"{self.function}: batch_size must return a whole number of at least 1, got {given!r} "
                    f"[batch {index}]"
                )
            return size
        found = batch_size_of(batch)
        if found is None and not self.told:
            self.told = True
            warn(
                f"{self.function}: a batch must hold a tensor for its samples to be counted, got {_described(batch)} "
                f"[batch {index}]: batches without one count as one sample. Give batch_size=, a function of a batch."
            )
        return found or 1

    def add_up(self, peers: Peers) -> float:
        """The weight of what this process has summed, so that all weigh alike; ``total`` is that of all then."""
        everyone = peers.gather((self.first, self.total))
        reference = next((first for first, _ in everyone if first), 1)
        self.total = sum(total * (first / reference) for first, total in everyone)
        return self.first / reference


class Counted(Protocol):
    """A pass over data whose batches are counted."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@overload
def first_batches(loader: Counted, fraction: float) -> Counted: ...


@overload
def first_batches(loader: Iterable[Any], fraction: float) -> Iterable[Any]: ...


def first_batches(loader: Iterable[Any], fraction: float) -> Iterable[Any]:
    """The first ``fraction`` of the loader's batches, at least one; they have a length, as the loader does.

    Raises:
        TypeError: ``fraction`` is below 1 and the loader has no length.

    Warns:
        UserWarning: a ``DataLoader`` takes its data in order, so its first batches are no sample of them.

    Examples:
        >>> part = first_batches(["a", "b", "c", "d"], 0.5)
        >>> len(part), list(part)
        (2, ['a', 'b'])
    """
    if fraction == 1:
        return loader
    if not isinstance(loader, Sized):
        raise TypeError(
            f"first_batches: loader must have a length for data_fraction = {fraction}, got {type(loader).__name__}. "
            "Set data_fraction to 1 and pass fewer batches."
        )
    count = max(1, round(len(loader) * fraction))
    if count < len(loader) and _is_sequential(loader):
        warn(
            f"first_batches: loader must be shuffled for data_fraction = {fraction}, got a DataLoader that takes its "
            f"data in order: its first {count} of {len(loader)} batches may be all of one class. Make it with "
            "shuffle=True, or set data_fraction to 1."
        )
    return _First(loader, count)


def _is_sequential(loader: Any) -> bool:
    """Whether it is a DataLoader, or one that Accelerate has wrapped, with a sampler that keeps the data's order."""
    if not isinstance(loader, DataLoader):
        return False
    source: Any = loader
    while getattr(source, "batch_sampler", None) is not None:
        source = source.batch_sampler
    sampler = getattr(source, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        return not sampler.shuffle
    return isinstance(sampler, SequentialSampler)


@dataclass(frozen=True)
class _First:
    """A loader's first ``count`` batches."""

    loader: Iterable[Any]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.count)
