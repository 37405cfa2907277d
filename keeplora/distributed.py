"""Several processes on one task, each with its share of the data: sums over all of them, errors that reach all.

The only module that imports torch.distributed.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from keeplora._calls import in_words_of_the_call

__all__ = ["Group", "PeerError", "Processes", "average_gradients", "processes", "together"]

T = TypeVar("T")
P = ParamSpec("P")

_FAILED = "keeplora/failed in a step"
_LOOK, _GRACE = 0.5, 2.0
"""Seconds between two looks at the store, and for an exchange to notice by itself that a process has ended."""


class PeerError(RuntimeError):
    """Another process failed; the message says which one, and of what."""


Group = Any
"""A ``torch.distributed.ProcessGroup``, which this process is in."""

_WATCHED: ContextVar[threading.Event | None] = ContextVar("ends the look-out of the running together()", default=None)
_SHARING: ContextVar[Group | None] = ContextVar("the group of the block of together() that is running", default=None)


class Processes:
    """The processes of a group of torch.distributed, or this one alone where there is no group.

    Every process makes the same calls in the same order. What one gives to [`gather`][] or [`add`][] takes a
    failure of another into account: whoever fails inside [`together`][] says so where the others wait next.

    Args:
        group: The group; torch.distributed's default one if None.

    Attributes:
        rank: This process, counted in the group. size: How many there are.

    Raises:
        ValueError: a group that this process is not in.
    """

    def __init__(self, group: Group | None = None) -> None:
        grouped = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if grouped else 0
        self.size = dist.get_world_size(group) if grouped else 1
        if self.rank < 0:
            raise ValueError(
                f"processes: group must be one that this process is in, got another on rank {dist.get_rank()}. Call "
                "with the group in its members alone."
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes get through, or in which all raise: the one that failed its own error.

        Inside it, [`processes`][] gives those of this group.

        Raises:
            PeerError: another process failed, or was stopped.
        """
        before = _SHARING.set(self.group)
        try:
            with self._watching():
                yield
        except PeerError:
            raise  # all know
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            if not vars(error).get("told_peers"):
                vars(error)["told_peers"] = True
                self._exchange(None, f"{type(error).__name__}: {in_words_of_the_call(str(error))}")
            raise
        finally:
            _SHARING.reset(before)
        self.gather(None)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Inside of [`together`][], a block in which others wait: several additions, or FSDP2's exchanges.

        Who fails in it cannot say so in an exchange: the others would take it for another one. It is written where they
        look while they wait, who end then, if it takes the end of their process. The group cannot be used any more.

        Raises:
            PeerError: an exchange failed since another process has failed.
        """
        try:
            yield
        except BaseException as error:
            if self.size == 1:
                raise
            vars(error)["told_peers"] = True
            _stop_watching()
            if isinstance(error, RuntimeError) and (cause := self._board.read() or _lost(error)):
                self._board.write(cause)
                raise PeerError(cause) from error
            self._board.write(f"process {self.rank} of {self.size} failed: {type(error).__name__}: {error}")
            raise

    @property
    def _board(self) -> _Board:
        return _Board(self.group)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Meanwhile this process looks whether another one has failed in a step, and does not wait for it for long."""
        if self.size == 1 or _WATCHED.get() is not None:
            yield
            return
        over = threading.Event()
        before = _WATCHED.set(over)
        watch = threading.Thread(target=self._board.watch, args=(over,), name="keeplora-watch", daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()
            _WATCHED.reset(before)

    def gather(self, value: T) -> list[T]:
        """What every process gave, by rank; small Python objects.

        Raises:
            PeerError: another process failed.
        """
        replies = self._exchange(value, None)
        failed = {rank: error for rank, (_, error) in enumerate(replies) if error is not None}
        if failed:
            rank, error = next(iter(failed.items()))
            raise PeerError(f"process {rank} of {self.size} failed, so this one (rank {self.rank}) stops: {error}")
        return [reply for reply, _ in replies]

    def add(self, tensor: Tensor) -> None:
        """Add up ``tensor`` over all processes, in place. Shape and dtype must be the same everywhere."""
        if self.size > 1:
            with self._exchanging():
                dist.all_reduce(tensor, group=self.group)

    def sum_of(self, value: float) -> float:
        """Of a number of every process, added up in the order of ranks: the same bits everywhere."""
        return sum(self.gather(value))

    def rows_to(self, owner: int, rows: Tensor, count: int) -> Tensor | None:
        """``count`` rows of a matrix that all processes hold some of, in the order of ranks, at ``owner``; else None.

        Every process but the last ones holds ``⌈count / size⌉``.
        """
        if self.size == 1:
            return rows
        mine = rows.new_zeros(-(-count // self.size), rows.shape[1])
        mine[: len(rows)] = rows
        parts = [torch.empty_like(mine) for _ in range(self.size)] if self.rank == owner else None
        with self._exchanging():
            dist.gather(mine, parts, group=self.group, group_dst=owner)
        return None if parts is None else torch.cat(parts)[:count]

    def broadcast(self, owner: int, tensor: Tensor | None, like: Tensor) -> Tensor:
        """The matrix that ``owner`` has, in every process, on the device of ``like``."""
        if self.size == 1:
            assert tensor is not None
            return tensor
        shape, dtype = self.gather(None if tensor is None else (tuple(tensor.shape), tensor.dtype))[owner] or (
            (0,),
            None,
        )
        sent = torch.empty(shape, dtype=dtype, device=like.device) if tensor is None else tensor.contiguous()
        if sent.numel():
            with self._exchanging():
                dist.broadcast(sent, group=self.group, group_src=owner)
        return sent

    def require_same(self, function: str, tensors: Mapping[str, Tensor]) -> None:
        """Refuse tensors that differ between processes, by their sums in float64.

        Raises:
            ValueError: a tensor differs (it is named), or some processes have others.
        """
        if self.size == 1:
            return
        found = [tensor.detach() for tensor in tensors.values()]
        sums = [torch.stack([t.sum(dtype=torch.float64), t.abs().sum(dtype=torch.float64)]) for t in found]
        mine = dict(zip(tensors, torch.stack([pair.cpu() for pair in sums]).tolist() if sums else [], strict=True))
        for rank, theirs in enumerate(self.gather(mine)):
            if theirs != mine:
                name = next((n for n in [*mine, *theirs] if mine.get(n) != theirs.get(n)), "")
                raise ValueError(
                    f"{function}: every process must hold the same weights, got sums {theirs.get(name)} on rank {rank} "
                    f"and {mine.get(name)} on rank {self.rank} [{name}]. Start from the same weights and average "
                    "gradients: train under DistributedDataParallel, or let backward() do it where FSDP2 is used."
                )

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        """An exchange with the others. Who is torn out of it is out of step: it says so on the board alone.

        Raises:
            PeerError: another process has ended.
        """
        try:
            yield
        except RuntimeError as error:
            _stop_watching()
            raise PeerError(self._board.read() or _lost(error, surely=True)) from error
        except (KeyboardInterrupt, SystemExit) as error:
            _stop_watching()
            vars(error)["told_peers"] = True
            self._board.write(f"process {self.rank} of {self.size} was stopped: {type(error).__name__}")
            raise

    def _exchange(self, value: Any, error: str | None) -> list[Any]:
        if self.size == 1:
            return [(value, error)]
        replies: list[Any] = [None] * self.size
        with self._exchanging():
            dist.all_gather_object(replies, (value, error), group=self.group)
        return replies


def _stop_watching() -> None:
    """This process waits no more: an error is on its way through it."""
    over = _WATCHED.get()
    if over is not None:
        over.set()


def _lost(error: RuntimeError, *, surely: bool = False) -> str:
    """What is said of an exchange that got no answer; "" where the error may be of another kind, unless ``surely``."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    if surely or "gloo" in reason or isinstance(error, dist.DistError):
        return f"another process must answer, but has ended or cannot be reached: {reason}"
    return ""


class _Board:
    """Where a process of a group writes why it has failed: a key in the store of the group, which its end leaves."""

    def __init__(self, group: Group | None):
        members = dist.group.WORLD if group is None else group
        self._store: Any = None
        if members is not None:
            with suppress(RuntimeError):  # a backend without one
                self._store = members.get_group_store()

    def write(self, text: str) -> None:
        """The first one's text stays."""
        if self._store is not None:
            with suppress(RuntimeError):  # the process that had the store may be the one that has ended
                self._store.compare_set(_FAILED, "", text)

    def read(self) -> str:
        text = ""
        if self._store is not None:
            with suppress(RuntimeError):
                text = self._store.get(_FAILED).decode() if self._store.check([_FAILED]) else ""
        return text

    def watch(self, over: threading.Event) -> None:
        """End this process if another has failed, and ``over`` is not set soon after that."""
        while not over.wait(_LOOK):
            if (cause := self.read()) and not over.wait(_GRACE):
                print(f"keeplora: this process waits for one that will not come, and ends: {cause}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)  # the main thread cannot be reached: it waits in an exchange


def average_gradients(parameters: Sequence[Tensor], peers: Processes) -> None:
    """From now on every backward pass leaves the mean over all processes in ``grad``, as under DDP.

    One all-reduce of one flat buffer, at the end of the backward pass: before gradients are clipped. What earlier
    passes have accumulated is the same everywhere and stays as it is.
    """
    if peers.size == 1 or not parameters:
        return
    waiting: list[bool] = []

    def average() -> None:
        waiting.clear()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.flatten() for grad in grads])
        peers.add(flat)
        means = torch.split(flat / peers.size, [p.numel() for p in parameters])
        for parameter, mean in zip(parameters, means, strict=True):
            parameter.grad = mean.view_as(parameter).to(parameter.dtype)

    def arrived(_: Tensor) -> None:
        if not waiting:
            waiting.append(True)
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(average)

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]


def processes(group: Group | None = None) -> Processes:
    """Those that share a task now.

    Args:
        group: Their group. If None, that of the block of [`Processes.together`][] that is running; outside of any,
            torch.distributed's default group.

    Examples:
        >>> processes().gather("alone")
        ['alone']
    """
    return Processes(_SHARING.get() if group is None else group)


def together(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, whose error in one process is an error in all of them: [`Processes.together`][] around a call.

    An argument ``group`` of the call names the processes.

    Examples:
        >>> together(len)("ab")
        2
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        with processes(kwargs.get("group")).together():
            return function(*args, **kwargs)

    return guarded
