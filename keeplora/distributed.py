"""Several processes on one task, each with its share of the data: sums over all of them, errors that reach all.

The only module that imports torch.distributed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from keeplora._calls import in_words_of_the_call

__all__ = ["Group", "PeerError", "Processes", "average_gradients", "processes", "together"]

T = TypeVar("T")
P = ParamSpec("P")


class PeerError(RuntimeError):
    """Another process failed; the message says which one, and of what."""


Group = Any
"""A ``torch.distributed.ProcessGroup``, which this process is in."""

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
            with _in_step():
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
        with _in_step():
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
            with _in_step():
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
                    f"and {mine.get(name)} on rank {self.rank} [{name}]. Start from the same weights and train under "
                    "DistributedDataParallel."
                )

    def _exchange(self, value: Any, error: str | None) -> list[Any]:
        if self.size == 1:
            return [(value, error)]
        replies: list[Any] = [None] * self.size
        with _in_step():
            dist.all_gather_object(replies, (value, error), group=self.group)
        return replies


@contextmanager
def _in_step() -> Iterator[None]:
    """An exchange with the others. Who is torn out of it is out of step: it says nothing more, and its end says it all.

    Raises:
        PeerError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PeerError(f"another process must answer, but has ended or cannot be reached: {reason}") from error
    except (KeyboardInterrupt, SystemExit) as error:
        vars(error)["told_peers"] = True
        raise


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
