"""The steps of a pass that several processes run together, where each has only some rows of every weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from keeplora._messages import add_note
from keeplora.lora.host import LoraHost
from keeplora.lora.shares import is_shared_out, reshard

from .passes import Peers

__all__ = ["in_step", "steps"]


def steps(model: nn.Module, loader: Iterable[Any], peers: Peers) -> Iterator[tuple[Any, bool]]:
    """The batches of a pass, and whether each counts; between forwards, and in the end, every process has its own rows.

    Of a model whose weights FSDP2 has shared out every process runs every step, or the others would wait: before each
    they tell each other who has a batch. Who has none left runs its first one again, or one of another process, and
    that does not count: observers do not see it.
    """
    if not is_shared_out(model):
        for batch in loader:
            yield batch, True
        return
    batches, none = iter(loader), object()
    spare = none
    while True:
        batch = next(batches, none)
        spare = batch if spare is none else spare
        said = peers.gather((batch is not none, spare is not none))
        if not any(has for has, _ in said):
            break
        if not all(spares for _, spares in said):  # somebody has had no batch at all, and is lent one
            lender = next(rank for rank, (has, _) in enumerate(said) if has)
            lent = peers.gather(batch if peers.rank == lender else None)[lender]
            spare = lent if spare is none else spare
        if batch is none:
            watched = [(host, host.observer) for host in model.modules() if isinstance(host, LoraHost)]
            for host, _ in watched:
                host.observer = None
            yield spare, False
            for host, observer in watched:  # not after an error: then nobody is looking any more
                host.observer = observer
        else:
            yield batch, True
        reshard(model)


@contextmanager
def in_step(model: nn.Module, peers: Peers) -> Iterator[None]:
    """A forward and its backward. Where the others wait in the middle of it, an error is said by ending."""
    if not is_shared_out(model):
        yield
        return
    try:
        with peers.in_step():
            yield
    except BaseException as error:
        add_note(
            error,
            "Weights are shared out by FSDP2: when a process fails in the middle of a step, all processes end, and the "
            "model cannot be used any more. Let this process end.",
        )
        raise
