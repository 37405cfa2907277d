"""Files that anybody may have written: read quickly or refused quickly, whatever they are."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NoReturn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "MOST_JSON",
    "check_tensor_file",
    "fault",
    "parse_json",
    "parse_toml",
    "parse_yaml",
    "read_bytes",
    "read_lines",
    "tensor_file",
]

MOST_JSON = 2**26
"""Bytes of a JSON file: a thousand layers over a thousand tasks take a tenth of it."""


def read_bytes(path: str | os.PathLike[str], *, size: int | None = None, most: int | None = None) -> bytes:
    """The bytes of a regular file. Pipes, devices and sockets are not waited for, and nothing is read that is too long.

    Args:
        size: How many there must be.
        most: How many there may be.

    Raises:
        OSError: there is none, or we may not.
        ValueError: it is something else than a file, or of another size.
    """
    with _opened(path) as (file, held):
        if size is not None and held != size:
            raise ValueError(f"of {size} bytes, got {held}")
        if most is not None and held > most:
            raise ValueError(f"of at most {most} bytes, got {held}")
        return file.read(held)


def read_lines(path: str | os.PathLike[str], *, most: int) -> Iterator[bytes]:
    """The lines of a regular file, one at a time: a file of any size takes the memory of its longest line.

    Args:
        most: How many bytes a line may have.

    Raises:
        OSError: as `read_bytes`.
        ValueError: too; or a line is longer.
    """
    with _opened(path) as (file, _):
        while line := file.readline(most + 1):
            if len(line) > most:
                raise ValueError(f"of lines of at most {most} bytes, got a longer one")
            yield line


@contextmanager
def tensor_file(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, bytes, dict[str, Any]]]:
    """A safetensors file that stands where its tensors begin, the bytes before them, and their table.

    The size must be what the table says it is: a file of 40 GB that holds nothing is refused before it is read. Of
    every tensor the table has a dtype, a shape and two offsets, all of the right kind.

    Raises:
        OSError: as ``read_bytes``.
        ValueError: too; or it is none, or longer or shorter than its tensors.
    """
    with _opened(path) as (file, size):
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if length > min(size - 8, MOST_JSON):
            raise ValueError(f"a safetensors file, got a table of {length} bytes in {size}")
        text = file.read(length)
        table = parse_json(text)
        if not isinstance(table, dict):
            raise ValueError(f"a safetensors file, got {type(table).__name__} for a table")
        table.pop("__metadata__", None)
        for name, entry in table.items():
            if not _is_entry(entry):
                raise ValueError(f"a safetensors file, got a table that cannot be read [{name[:80]}]")
        whole = 8 + length + max([0, *(entry["data_offsets"][1] for entry in table.values())])
        if whole != size:
            raise ValueError(f"of the {whole} bytes its tensors take, got {size}")
        yield file, first + text, table


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and _are_sizes(entry.get("shape"))
        and _are_sizes(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)


def check_tensor_file(path: str | os.PathLike[str]) -> int:
    """The size of a safetensors file, which must be what its first bytes say it is: ``tensor_file``."""
    with tensor_file(path) as (file, *_):
        return os.fstat(file.fileno()).st_size


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, and its size."""
    _check_regular(os.stat(path))  # to open a device may do something
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _check_regular(status)
        yield file, status.st_size


def fault(error: Exception) -> str:
    """What a file must do that the functions here refuse with this error: goes after "must".

    >>> fault(FileNotFoundError(2, "No such file")), fault(PermissionError(13, "Permission denied"))
    ('exist', 'be a file that can be read, got: Permission denied')
    """
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "exist"
    return f"be a file that can be read, got: {error.strerror}" if isinstance(error, OSError) else f"be {error}"


def parse_json(raw: bytes, *, finite: bool = True) -> Any:
    """The value of strict JSON: no key twice, no number that takes minutes, however deep or long it is.

    Args:
        finite: Whether NaN and infinity are refused, which JSON does not have, and others write all the same.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number if finite else None)
    except RecursionError:
        raise ValueError("JSON, got lists or objects too deep to be read") from None
    except ValueError as error:  # of JSON, of UTF-8, of a number of thousands of digits
        raise ValueError(f"JSON, got: {str(error)[:200]}") from None


def parse_toml(raw: bytes) -> dict[str, Any]:
    """The values of TOML.

    Raises:
        ValueError: it is none.
    """
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("TOML, got lists or tables too deep to be read") from None
    except ValueError as error:
        raise ValueError(f"TOML, got: {str(error)[:200]}") from None


def parse_yaml(raw: bytes) -> dict[str, Any]:
    """The values of YAML 1.2, in which ``1e-3`` is a number and no key may stand twice.

    Raises:
        ValueError: it is none, or ruamel.yaml is not installed.
    """
    try:
        from ruamel.yaml import YAML  # optional
        from ruamel.yaml.error import YAMLError
    except ImportError:
        raise ValueError("TOML, or YAML with ruamel.yaml installed. Run pip install 'keeplora[yaml]'") from None
    try:
        values = YAML(typ="safe", pure=True).load(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("YAML, got lists or tables too deep to be read") from None
    except (YAMLError, ValueError) as error:
        raise ValueError(f"YAML, got: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"YAML of settings and their values, got {type(values).__name__}")
    return values


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:80]!r} twice")
        result[key] = value
    return result


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no number")


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK, "a device": stat.S_ISCHR}
        kind = next((name for name, test in kinds.items() if test(status.st_mode)), "something else")
        raise ValueError(f"a regular file, got {kind}")
