"""Files that anybody may have written: read quickly or refused quickly, whatever they are."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["MOST_JSON", "check_tensor_file", "parse_json", "read_bytes"]

MOST_JSON = 2**26
"""Bytes of a JSON file: a thousand layers over a thousand tasks take a tenth of it."""


def read_bytes(path: str | os.PathLike[str], *, size: int | None = None, most: int | None = None) -> bytes:
    """The bytes of a regular file. Pipes, devices and sockets are not waited for, and nothing is read that is too long.

    Args:
        size: How many there must be. most: How many there may be.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else than a file, or of another size; the message goes after "must be".
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open a device may do something
        raise ValueError(f"a regular file, got {_kind(os.stat(path).st_mode)}")
    descriptor = os.open(path, flags)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"a regular file, got {_kind(status.st_mode)}")
        if size is not None and status.st_size != size:
            raise ValueError(f"of {size} bytes, got {status.st_size}")
        if most is not None and status.st_size > most:
            raise ValueError(f"of at most {most} bytes, got {status.st_size}")
        return file.read(status.st_size)


def check_tensor_file(path: str | os.PathLike[str]) -> int:
    """The size of a safetensors file, which must be what its first bytes say it is.

    Looks at the table of tensors alone: a file of 40 GB that holds nothing is refused before it is read.

    Raises:
        FileNotFoundError: there is none.
        ValueError: as :func:`read_bytes`; or it is none, or longer or shorter than its tensors.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"a regular file, got {_kind(status.st_mode)}")
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(status.st_size - 8, MOST_JSON):
            raise ValueError(f"a safetensors file, got a table of {length} bytes in {status.st_size}")
        table = parse_json(file.read(length))
    try:
        ends = [entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"]
        whole = 8 + length + max([0, *ends])
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"a safetensors file, got a table that cannot be read: {error}") from None
    if whole != status.st_size:
        raise ValueError(f"of the {whole} bytes its tensors take, got {status.st_size}")
    return status.st_size


def parse_json(raw: bytes) -> Any:
    """The value of strict JSON: no key twice, no NaN, no number that takes minutes, however deep or long it is.

    Raises:
        ValueError: it is none; the message goes after "must be".
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("JSON, got lists or objects too deep to be read") from None
    except ValueError as error:  # of JSON, of UTF-8, of a number of thousands of digits
        raise ValueError(f"JSON, got: {str(error)[:200]}") from None


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:80]!r} twice")
        result[key] = value
    return result


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no number")


def _kind(mode: int) -> str:
    kinds = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK, "a device": stat.S_ISCHR}
    return next((name for name, test in kinds.items() if test(mode)), "something else")
