"""Disks that are full or fail: one sentence, and the old state is there or the new one."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .children import REFUSED, SAVED, at_every_operation, end, limited_files, start
from .kills import left, lost, savings
from .subjects import learned
from .trials import Tries


def _raises(number: int) -> Callable[[], None]:
    def action() -> None:
        raise OSError(number, os.strerror(number))

    return action


def full_at_every_write(folder: Path, numbers: random.Random) -> Tries:
    """No space at the first operation that needs some, at the second, …"""
    yield from _failing(folder, errno.ENOSPC, changes=True)


def failing_at_every_operation(folder: Path, numbers: random.Random) -> Tries:
    """A disk that fails at the first operation of any kind, at the second, …"""
    yield from _failing(folder, errno.EIO, changes=False)


def _failing(folder: Path, number: int, *, changes: bool) -> Tries:
    for i, saving in enumerate(savings()):
        place = folder / str(i)
        saving.first(place)
        codes = at_every_operation(place, lambda: saving.second(place), _raises(number), changes=changes)  # noqa: B023
        for code in codes:
            wrong = None if code in (SAVED, REFUSED) else f"ended with exit code {code}"
            wrong = wrong or saving.wrong(place, code == SAVED) or (left(place) if changes else None)
            saving.second(place)
            yield wrong or saving.wrong(place, True)
            saving.first(place)


def short_files(folder: Path, numbers: random.Random) -> Tries:
    """Files that cannot grow beyond a size, as on a full disk: real writes fail, those of safetensors, too."""
    old, new = learned(tasks=1), learned(tasks=2)
    new.save(folder)
    largest = max(file.stat().st_size for file in folder.iterdir())
    old.save(folder)
    for size in [0, 1, *(numbers.randrange(2, largest) for _ in range(30)), largest]:

        def save(size: int = size) -> None:
            with limited_files(size):
                new.save(folder)

        code = end(start(save))
        wanted = SAVED if size == largest else REFUSED
        wrong = None if code == wanted else f"ended with exit code {code} in files of {size} bytes"
        yield wrong or lost(folder, [new if size == largest else old]) or left(folder)


def small_disk(folder: Path, numbers: random.Random) -> Tries:
    """A real file system of a few pages, where this process may mount one; else there is no try."""
    old, new = learned(tasks=1), learned(tasks=2)
    for pages in range(2, 40):
        with _mounted(folder / str(pages), pages) as place:
            if place is None:
                return
            first, second = end(start(lambda: old.save(place))), end(start(lambda: new.save(place)))
            allowed = [method for method, code in ((old, first), (new, second)) if code == SAVED]
            wrong = None if {first, second} <= {SAVED, REFUSED} else f"exit codes {first} and {second}"
            if allowed:
                wrong = wrong or lost(place, allowed[-1:])
            yield wrong or left(place)


@contextmanager
def _mounted(place: Path, pages: int) -> Iterator[Path | None]:
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={pages * 4096}", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield place if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(place)], check=False)
