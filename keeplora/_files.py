"""Files that are whole or not there, whoever writes beside us: one mechanism for all that the package writes.

A file is written in a folder of its own beside its place, flushed to disk, renamed. Where several files belong
together, one writer at a time holds the folder's lock (``filelock``, which torch depends on, too: the system frees its
lock when a process dies, and it knows network folders). Readers need no lock, so folders may be read-only for them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ._messages import warn

__all__ = [
    "BusyError",
    "WriteError",
    "flush",
    "folder_named",
    "is_abandoned",
    "one_writer",
    "sha256",
    "staged",
    "told",
    "write_atomic",
    "write_json",
]

LOCK = ".keeplora.lock"
PATIENCE = 600.0
"""Seconds to wait for another writer; large states on slow disks take minutes."""
_SILENT = 5.0
_ABANDONED = 3600.0
"""A file that nobody has touched for this many seconds is nobody's: files in the making are touched all the time."""

_HOST = re.sub(r"[^\w.-]", "_", platform.node()) or "host"
_OWNED = re.compile(r"~([\w.-]+)~(\d+)~[0-9a-f]{8}\.tmp$")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOCKLESS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def folder_named(function: str, path: object) -> Path:
    """The folder that a user names as ``path``; TypeError for what is no name."""
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"{function}: path must name a folder, got {path!r}. Give a string or a pathlib.Path.")
    return Path(path)


class WriteError(OSError):
    """A file that cannot be written; ``errno`` is the system's."""


class BusyError(OSError):
    """A folder that another process writes to."""


@contextmanager
def one_writer(folder: str | os.PathLike[str], *, patience: float = PATIENCE) -> Iterator[None]:
    """Be the only one that writes to ``folder``, which is made; other writers wait for this one.

    What killed processes left there, whatever they wrote, is deleted first.

    Raises:
        BusyError: another process has written for ``patience`` seconds.
        WriteError: the folder cannot be written to.
    """
    with ExitStack() as stack:
        with told(Path(folder)):
            Path(folder).mkdir(parents=True, exist_ok=True)
            _acquire(Path(folder), stack, patience)
            _sweep(Path(folder))
        yield


def _acquire(folder: Path, stack: ExitStack, patience: float) -> None:
    lock = FileLock(folder / LOCK)
    for seconds in (min(_SILENT, patience), patience):
        try:
            stack.enter_context(lock.acquire(timeout=seconds))
            return
        except Timeout:
            if seconds < patience:
                warn(f"keeplora waits for another process that writes to {folder}")
        except (OSError, NotImplementedError) as error:  # the latter from older versions of filelock
            if isinstance(error, OSError) and error.errno not in _LOCKLESS:
                raise
            warn(f"keeplora: {folder} must not be written to by two processes at a time: its file system has no locks")
            return
    raise BusyError(
        f"write: {folder} must have one writer at a time, got another process that is still at it after {patience:g} "
        "seconds. Wait for it or end it, or give another folder"
    )


@contextmanager
def staged(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, in a folder beside ``target`` that is nobody else's and is deleted afterwards.

    So are those that killed processes left in the same place. The path has a folder of its own because
    libraries may put files of theirs beside it, as safetensors does.

    Raises:
        WriteError: the block could not write.
    """
    target = Path(target)
    with told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        own = target.with_name(f".{target.name}~{_HOST}~{os.getpid()}~{secrets.token_hex(4)}.tmp")
        try:
            own.mkdir()
            yield own / target.name
        finally:
            shutil.rmtree(own, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Delete what killed processes left when they wrote in ``folder``: the next writer may write other files."""
    for other in folder.glob(".*~*.tmp"):
        if _OWNED.search(other.name) and is_abandoned(other):
            shutil.rmtree(other, ignore_errors=True)


def write_atomic(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let ``write(temporary)`` fill a file beside ``path``, flush it to disk and rename it to ``path``.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     target = Path(folder) / "note.txt"
    ...     write_atomic(target, lambda temporary: temporary.write_text("done"))
    ...     target.read_text()
    'done'
    """
    target = Path(path)
    with staged(target) as temporary:
        write(temporary)
        flush(temporary)
        os.replace(temporary, target)
        flush(target.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as strict JSON (no NaN), atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal, read in pieces. (hashlib.file_digest is newer than Python 3.10.)"""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 18):
            digest.update(piece)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Force a file or folder to disk, so that a rename never overtakes the data it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_abandoned(path: Path) -> bool:
    """Whether whoever was writing ``path`` is gone: a process of this machine that ended, or nobody for an hour."""
    owner = _OWNED.search(path.name)
    if owner is not None and owner[1] == _HOST and not _is_alive(int(owner[2])):
        return True
    try:
        touched: float = max(each.stat().st_mtime for each in (path, *(path.iterdir() if path.is_dir() else ())))
    except FileNotFoundError:
        return False
    return time.time() - touched > _ABANDONED


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is not a question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def told(path: Path) -> Iterator[None]:
    """One sentence for whatever the system, or safetensors for it, says of a file that cannot be written."""
    try:
        yield
    except (BusyError, WriteError):
        raise
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _os_error(error)
        if number is None:
            raise
        remedy = "Free some space and try again" if number in _FULL else "Choose a place where you may write"
        told = WriteError(
            f"write: {path} must be writable, got: {os.strerror(number)}. What was saved there before is as it was. "
            f"{remedy}"
        )
        told.errno = number
        raise told from error


def _os_error(error: SafetensorError) -> int | None:
    """The system's number in what safetensors says of it."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return None if number is None else int(number[1])
