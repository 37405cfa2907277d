"""Processes of one gloo group that do the same work, each on its share, and wait for each other's next round."""

import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.harness import recorded_bytes

Setup = Callable[[], tuple[Any, ...]]
Work = Callable[..., Any]


class Team:
    """``size`` processes with one thread each, which call ``work(*setup())``; both are pickled.

    They end when this object does: each waits at a pipe whose other end is here.
    """

    def __init__(self, size: int, setup: Setup, work: Work) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        context = mp.get_context("spawn")
        for rank in range(size):
            here, there = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            context.Process(target=_member, args=(there, store, rank, size, setup, work), daemon=True).start()
            there.close()  # so that a member that dies is an end of file here
            self._pipes.append(here)
        self.call()  # they are there, and warm

    def call(self) -> None:
        """One round of the work, in all processes at once."""
        self._ask("call")

    def peak_bytes(self) -> int:
        """The most that one of them holds at once in a round, what ``setup`` made not counted."""
        return max(self._ask("peak"))

    def _ask(self, what: str) -> list[Any]:
        try:
            for pipe in self._pipes:
                pipe.send(what)
            return [pipe.recv() for pipe in self._pipes]
        except (EOFError, BrokenPipeError):
            raise RuntimeError("a process of the team has ended; its error is above") from None


def _member(pipe: Connection, store: str, rank: int, size: int, setup: Setup, work: Work) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    arguments = setup()
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            break
        if what == "peak":
            pipe.send(recorded_bytes(work, *arguments)[0])
        else:
            work(*arguments)
            pipe.send(None)
    dist.destroy_process_group()
