"""Runs in processes of their own, several at a time.

Each talks to this one through a pipe of its own. A pipe ends with the process at its other end, however that ends:
nobody waits for a dead process, and there are no semaphores that a killed one could leave.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch

from keeplora._files import WriteError
from keeplora.train.config import RunConfig
from keeplora.train.evaluated import evaluations_folder
from keeplora.train.events import Event, Listener
from keeplora.train.loop import run_one
from keeplora.train.record import run_folder
from keeplora.train.workload import configured_workload

__all__ = ["Pool", "WorkerError"]

_STEP_NEWS_SECONDS = 0.2
_LOOK_SECONDS = 0.5
"""Between two looks at the processes themselves: a worker's own children may hold its pipe open when it is dead."""
_GRACE_SECONDS = 5.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(RuntimeError):
    """A run failed in its process; the message holds its traceback, or the one sentence that says it all."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection[Any, Any]
    pair: tuple[str, int] | None = None

    @property
    def name(self) -> str:
        return "a worker" if self.pair is None else f"{self.pair[0]}, seed {self.pair[1]}"

    def end(self) -> str:
        """How the process ended."""
        self.process.join(_GRACE_SECONDS)
        code = self.process.exitcode
        if code is None:
            return "closed its pipe"
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was ended by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")


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
        pairs = deque(self.waiting)
        clean = False
        try:
            with _spawning(self.config.threads):
                for _ in range(min(self.config.workers, len(pairs))):
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_work, args=(self.config, theirs), daemon=True)
                    process.start()
                    theirs.close()
                    self.workers.append(_Worker(process, ours))
            for worker in self.workers:
                self.order(worker, pairs)
            self.listen(pairs)
            clean = True
        finally:
            self.stop(clean)

    def listen(self, pairs: deque[tuple[str, int]]) -> None:
        """Hear the workers, and give each its next pair, until all are through."""
        while busy := {worker.pipe: worker for worker in self.workers if worker.pair is not None}:
            for pipe in wait(list(busy), timeout=_LOOK_SECONDS) or self.dead():
                self.hear(busy[pipe], pairs)  # type: ignore[index]

    def order(self, worker: _Worker, pairs: deque[tuple[str, int]]) -> None:
        worker.pair = pairs.popleft() if pairs else None
        with suppress(OSError):  # it is dead, which is heard where it should answer
            worker.pipe.send(worker.pair)

    def dead(self) -> list[Connection[Any, Any]]:
        return [worker.pipe for worker in self.workers if worker.pair is not None and not worker.process.is_alive()]

    def hear(self, worker: _Worker, pairs: deque[tuple[str, int]]) -> None:
        """Take one message, or find that there will be none."""
        try:
            message = worker.pipe.recv() if worker.process.is_alive() or worker.pipe.poll() else ""
        except (EOFError, OSError):
            message = ""
        if isinstance(message, Event):
            self.listener(message)
        elif message is None:
            self.order(worker, pairs)
        elif message:
            raise WorkerError(f"run_benchmark: {worker.name} failed: {message}")
        else:
            raise WorkerError(
                f"run_benchmark: {worker.name} must finish, but its process {worker.end()}. Run the command again to "
                "resume"
            )

    def stop(self, clean: bool) -> None:
        """Let the workers end; after a failure or Ctrl-C ask them to stop, and insist after five seconds."""
        for worker in self.workers:
            if not clean:
                worker.process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for worker in self.workers:
            worker.process.join(max(deadline - time.monotonic(), 0.1))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()


class _Stop(BaseException):
    """Raised in a worker by the signal of its parent; not an Exception, so nothing mistakes it for a failure."""


def _work(config: RunConfig, pipe: Connection[Any, Any]) -> None:
    """The life of a worker process: run pairs until there are none, or until told to stop, or left alone."""
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(config.threads)
    last = 0.0

    def tell(event: Event) -> None:
        nonlocal last
        if event.kind == "step" and time.monotonic() - last < _STEP_NEWS_SECONDS and event.step != event.steps:
            return
        last = time.monotonic()
        say(event)

    def say(message: Event | str | None) -> None:
        try:
            pipe.send(message)
        except OSError:  # nobody listens any more
            raise _Stop from None

    with suppress(_Stop):
        try:
            workload = None
            while (pair := _ordered(pipe)) is not None:
                workload = configured_workload(config, config.device) if workload is None else workload
                label, seed = pair
                place, known = run_folder(config.out, label, seed), evaluations_folder(config)
                run_one(config, workload, label, seed, folder=place, evaluations=known, listener=tell)
                say(None)
        except WriteError as error:
            say(str(error))
        except Exception:
            say(f"\n{traceback.format_exc()}")


def _ordered(pipe: Connection[Any, Any]) -> tuple[str, int] | None:
    try:
        pair: tuple[str, int] | None = pipe.recv()
    except (EOFError, OSError):
        raise _Stop from None
    return pair


def _end_with_parent() -> None:
    """End this process when its parent has ended, in whatever it is."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(1)


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
