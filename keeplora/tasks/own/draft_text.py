"""TOML as a draft needs it: values that are escaped, and comments of any text, in lines of a readable length.

Plain text rather than a TOML library: nothing is read and changed again, and a basic string has three things to escape.
`draft` reads what it has written with ``parse_toml``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

__all__ = ["Lines", "printable", "quoted"]

_WIDTH = 110
Value = str | int | float | bool | Sequence[str | int]


def quoted(text: str) -> str:
    r"""A basic string of TOML. What UTF-8 cannot hold becomes a question mark.

    >>> print(quoted('a "b" \\ c'), quoted("é\n\x7f"))
    "a \"b\" \\ c" "é\u000a\u007f"
    """
    plain = text.encode("utf-8", "replace").decode("utf-8")
    return '"' + printable(plain.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def printable(text: str) -> str:
    r"""The text in one line: control characters, and whatever else shows nothing, as TOML escapes them.

    >>> print(printable("a\nb c"))
    a\u000ab c
    """
    return "".join(letter if letter.isprintable() else _escaped(ord(letter)) for letter in text)


def _escaped(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class Lines:
    """The lines of a file, one call for each part."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def comment(self, *texts: str) -> None:
        """A paragraph for every text. Control characters in it are escaped: a comment must not end early."""
        for text in texts:
            wrapped = textwrap.wrap(printable(text), _WIDTH, break_long_words=False, break_on_hyphens=False)
            self._lines += [f"# {line}" for line in wrapped]

    def table(self, head: str) -> None:
        """``[head]``, after an empty line."""
        self._lines += ["", head]

    def blank(self) -> None:
        """An empty line."""
        self._lines.append("")

    def set(self, name: str, value: Value | Mapping[str, float], why: str = "") -> None:
        """A setting, with its comment above it."""
        if why:
            self.comment(why)
        self._lines.append(f"{name} = {_value(value)}")

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def _value(value: Value | Mapping[str, float]) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_value(entry)}" for name, entry in value.items()) + " }"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_value(entry) for entry in value) + "]"
    return repr(value)
