"""Runs in processes of their own, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch

from keeplora.tasks.catalog import load_workload
from keeplora.train.config import RunConfig
from keeplora.train.events import Event, Listener
from keeplora.train.loop import run_one
from keeplora.train.record import run_folder

__all__ = ["Pool", "WorkerError"]

_STEP_NEWS_SECONDS = 0.2
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(RuntimeError):
    """A run failed in its process; the message holds its traceback."""


@dataclass
class _Worker:
    process: BaseProcess
    orders: Any
    pair: tuple[str, int] | None = None


@dataclass
class Pool:
    """Processes that each take the next waiting pair. Only this class talks to them."""

    config: RunConfig
    waiting: list[tuple[str, int]]
    listener: Listener
    workers: list[_Worker] = field(default_factory=list)

    def run(self) -> None:
        """Run all waiting pairs; the first failure stops the others, whose states stay resumable."""
        context = multiprocessing.get_context("spawn")
        news = context.Queue()
        pairs = deque(self.waiting)
        clean = False
        try:
            with _spawning(self.config.threads):
                for _ in range(min(self.config.workers, len(pairs))):
                    orders = context.Queue()
                    process = context.Process(
                        target=_work, args=(self.config, orders, news, len(self.workers)), daemon=True
                    )
                    process.start()
                    self.workers.append(_Worker(process, orders))
            for worker in self.workers:
                self.order(worker, pairs)
            while any(worker.pair is not None for worker in self.workers):
                try:
                    number, message = news.get(timeout=0.5)
                except queue.Empty:
                    self.look_for_dead()
                    continue
                if isinstance(message, Event):
                    self.listener(message)
                elif message is None:
                    self.order(self.workers[number], pairs)
                else:
                    raise WorkerError(f"run_benchmark: {self.name(self.workers[number])} failed:\n{message}")
            clean = True
        finally:
            self.stop(clean)

    def order(self, worker: _Worker, pairs: deque[tuple[str, int]]) -> None:
        worker.pair = pairs.popleft() if pairs else None
        worker.orders.put(worker.pair)

    def look_for_dead(self) -> None:
        for worker in self.workers:
            if worker.pair is not None and not worker.process.is_alive():
                raise WorkerError(
                    f"run_benchmark: {self.name(worker)} must finish, but its process ended with exit code "
                    f"{worker.process.exitcode} (negative: killed by that signal). Run the command again to resume"
                )

    def name(self, worker: _Worker) -> str:
        return "a worker" if worker.pair is None else f"{worker.pair[0]}, seed {worker.pair[1]}"

    def stop(self, clean: bool) -> None:
        """Let the workers end; after a failure or Ctrl-C ask them to stop, and insist after five seconds."""
        for worker in self.workers:
            if not clean:
                worker.process.terminate()
        deadline = time.monotonic() + 5
        for worker in self.workers:
            worker.process.join(max(deadline - time.monotonic(), 0.1))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


class _Stop(BaseException):
    """Raised in a worker by the signal of its parent; not an Exception, so nothing mistakes it for a failure."""


def _work(config: RunConfig, orders: Any, news: Any, number: int) -> None:
    """The life of a worker process: run pairs until there are none, or until told to stop."""
    signal.signal(signal.SIGTERM, _stop)
    torch.set_num_threads(config.threads)
    parent = multiprocessing.parent_process()
    last = 0.0

    def tell(event: Event) -> None:
        nonlocal last
        if event.kind == "step" and time.monotonic() - last < _STEP_NEWS_SECONDS and event.step != event.steps:
            return
        if parent is not None and not parent.is_alive():
            raise _Stop
        last = time.monotonic()
        news.put((number, event))

    try:
        workload = None
        while (pair := orders.get()) is not None:
            workload = load_workload(config.benchmark, config.device) if workload is None else workload
            label, seed = pair
            run_one(config, workload, label, seed, folder=run_folder(config.out, label, seed), listener=tell)
            news.put((number, None))
    except _Stop:
        news.cancel_join_thread()
    except Exception:
        news.put((number, traceback.format_exc()))


def _stop(signal_number: int, frame: FrameType | None) -> None:
    raise _Stop


@contextmanager
def _spawning(threads: int) -> Iterator[None]:
    """What children inherit: thread counts, which libraries read when they are loaded, and deafness to Ctrl-C.

    Ctrl-C reaches the whole process group, children that are still importing included; the parent tells them.
    """
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update({name: str(threads) for name in _THREAD_VARIABLES})
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
