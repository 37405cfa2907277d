"""What a file holds and where it lies, for fingerprints of data."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from keeplora._files import sha256

__all__ = ["content", "forget", "relative"]


def content(path: Path) -> str:
    """Hash of a file, read once in a process as long as it is as it was."""
    status = path.stat()
    return _hash(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1 << 20)
def _hash(path: Path, size: int, written: int) -> str:
    return sha256(path)[:16]


def forget() -> None:
    """Read files again, as a new process does."""
    _hash.cache_clear()


def relative(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()
