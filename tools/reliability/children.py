"""Functions in processes of their own, which may be killed or fail at any file operation."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from keeplora._files import BusyError, WriteError
from keeplora.lora import peft_checkpoint
from keeplora.methods import state as states

SAVED, REFUSED, TWO_SENTENCES, WRONG_CLASS = 0, 3, 4, 5
PATIENCE = 30.0
"""Seconds after which a process counts as hanging."""
HUNG = -1000
_THROUGH = 99

_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir"}
_CHANGES = {"os.rename", "os.mkdir", "fsync", "save_file", "half a file"}

# Forks share tqdm's own lock: one that is killed while a bar is drawn would hold it for ever.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


def start(function: Callable[[], Any]) -> int:
    """Run in a fork, which ends with one of the exit codes above."""
    process = os.fork()
    if process:
        return process
    code = WRONG_CLASS
    try:
        function()
        code = SAVED
    except (WriteError, BusyError) as error:
        code = REFUSED if "\n" not in str(error) else TWO_SENTENCES
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def end(process: int, patience: float = PATIENCE) -> int:
    """The exit code, negative for a signal; a process that hangs is killed."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    kill(process)
    return HUNG


def kill(process: int) -> None:
    """End a child for good."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(process, 0)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Interruption:
    """In a process of its own: at the n-th operation on files below a folder, from 1, do something else.

    Operations are those that Python tells of (open, rename, delete, make, list), fsync, the tensor file before it is
    written and when it is half written. ``changes`` counts those alone that need space.
    """

    def __init__(self, folder: Path, number: int, action: Callable[[], None], *, changes: bool = False):
        self.folder, self.left, self.action, self.changes = str(folder), number, action, changes

    def install(self) -> None:
        sys.addaudithook(self._audit)
        plain = os.fsync
        os.fsync = lambda descriptor: (self._count("fsync"), plain(descriptor))[1]  # type: ignore[assignment]
        states.write_tensors = self._half(states.write_tensors, 0)
        peft_checkpoint.save_file = self._half(peft_checkpoint.save_file, 1)  # type: ignore[attr-defined]

    def _half(self, plain: Callable[..., Any], place: int) -> Callable[..., Any]:
        """``plain``, whose argument at ``place`` is the path of a tensor file."""

        def save_file(*arguments: Any) -> Any:
            self._count("save_file")
            result = plain(*arguments)
            if self.left == 1:
                os.truncate(arguments[place], os.path.getsize(arguments[place]) // 2)
            self._count("half a file")
            return result

        return save_file

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or not arguments or not str(arguments[0]).startswith(self.folder):
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        self._count("write" if writes else event)

    def _count(self, event: str) -> None:
        if self.changes and event not in _CHANGES and event != "write":
            return
        self.left -= 1
        if self.left == 0:
            self.action()


def at_every_operation(
    folder: Path, function: Callable[[], Any], action: Callable[[], None], *, changes: bool = False
) -> Iterator[int]:
    """Exit codes of ``function`` with ``action`` at its first operation on files, its second, … until it is through."""
    for number in range(1, 1000):
        watch = Interruption(folder, number, action, changes=changes)

        def work(watch: Interruption = watch) -> None:
            watch.install()
            function()
            if watch.left > 0:
                os._exit(_THROUGH)

        code = end(start(work))
        if code == _THROUGH:  # there are fewer operations than that
            return
        yield code


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Files of this process grow to ``size`` bytes, as on a disk that is full then."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
