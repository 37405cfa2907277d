"""The rows of a file of JSON as people write them: a list, an object that holds one, or an object in every line."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from keeplora._messages import listed
from keeplora._untrusted import MOST_JSON, parse_json, read_bytes, read_lines

__all__ = ["json_rows"]

MOST_ARRAY = 2**30
"""Bytes of a JSON file: in memory it takes about ten times as much. JSON lines may be of any size."""
_BOMS = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_ZEROS: Mapping[tuple[bool, ...], str] = {
    (False, True, True, True): "utf-32-le", (True, True, True, False): "utf-32-be",
    (False, True, False, True): "utf-16-le", (True, False, True, False): "utf-16-be",
}  # fmt: skip
"""Which of the first four bytes are 0, where two characters of ASCII begin a file without a mark."""
_OF_A_ROW = ("conversations", "conversation", "messages", "text", "question")
"""What a sample has that stands alone in a file, and an object that holds a list of samples has not."""
_SPACE = b" \t\r\n"


def json_rows(path: Path, *, finite: bool = True) -> Iterator[tuple[str, Any]]:
    """The rows of a file and where each is, ``"sample 3"`` of a list or ``"line 3"``.

    A file that begins with ``[`` is a list. One that begins with ``{`` has an object in every line, or is one object
    that holds a single list, as ``{"data": [...]}`` does. Encodings are UTF-8, and UTF-16 and UTF-32 by their first
    bytes, with a byte order mark or without.

    Args:
        finite: Whether NaN and infinity are refused.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is none of these; the text goes after "must be".
    """
    encoding = _encoding(b"".join(islice(read_lines(path, most=MOST_ARRAY), 4)))  # a line has a byte at least
    whole = None if encoding == "utf-8" else _decoded(read_bytes(path, most=MOST_ARRAY), encoding)
    begins = list(islice((line for line in _lines(path, whole, MOST_ARRAY) if line.strip(_SPACE)), 2))
    if (values := _listed(path, whole, [line.strip(_SPACE) for line in begins], finite)) is not None:
        yield from ((f"sample {number}", value) for number, value in enumerate(values, 1))
        return
    for number, line in enumerate(_lines(path, whole, MOST_JSON), 1):
        if line.strip(_SPACE):
            try:
                yield f"line {number}", parse_json(line, finite=finite)
            except ValueError as error:
                raise ValueError(
                    f"a list in JSON, or an object of JSON in every line; line {number} must be {error}"
                ) from None


def _listed(path: Path, whole: bytes | None, begins: list[bytes], finite: bool) -> list[Any] | None:
    """The list that a file is or holds; None where there is an object in every line.

    ``begins``: its first lines that are not empty, two where there are as many.
    """
    if begins and begins[0].startswith(b"["):
        values: list[Any] = parse_json(_whole(path, whole), finite=finite)
        return values
    if not begins or not begins[0].startswith(b"{"):
        return None
    try:
        value = parse_json(begins[0], finite=finite)
        if len(begins) > 1:
            return None
    except ValueError:
        try:
            value = parse_json(_whole(path, whole), finite=finite)
        except ValueError:
            return None  # then the line that is no JSON is named
    lists = {name: held for name, held in value.items() if isinstance(held, list)}
    if not lists or any(name in value for name in _OF_A_ROW):
        return [value]
    rows = [name for name, held in lists.items() if held and all(isinstance(row, Mapping) for row in held)]
    if len(rows) != 1:
        raise ValueError(
            f"a list of samples or an object that holds one, got an object with {len(rows)} lists of samples, under "
            f"{listed(rows or list(lists))}. Write one list in a file: [{{…}}, {{…}}]"
        )
    return list(lists[rows[0]])


def _encoding(head: bytes) -> str:
    for mark, name in _BOMS.items():
        if head.startswith(mark):
            return name
    return _ZEROS.get(tuple(byte == 0 for byte in head[:4]), "utf-8")


def _decoded(raw: bytes, encoding: str) -> bytes:
    try:
        return raw.decode(encoding).encode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"text in {encoding.upper()}, as it begins, got: {error}. Save it as UTF-8") from None


def _whole(path: Path, whole: bytes | None) -> bytes:
    return read_bytes(path, most=MOST_ARRAY).removeprefix(codecs.BOM_UTF8) if whole is None else whole


def _lines(path: Path, whole: bytes | None, most: int) -> Iterator[bytes]:
    lines = read_lines(path, most=most) if whole is None else iter(whole.split(b"\n"))
    return (line.removeprefix(codecs.BOM_UTF8) if number == 0 else line for number, line in enumerate(lines))
