"""How the package speaks to its user: warnings that point at the user's line, and names that were probably meant."""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["listed", "nearest", "suggest", "warn"]

_PACKAGE = os.fspath(Path(__file__).parent) + os.sep
_WRAPPERS = (f"torch{os.sep}utils{os.sep}_contextlib.py", f"{os.sep}contextlib.py")
"""Between the user and us where a function is decorated, with ``torch.no_grad`` for one."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the first line outside the package, however deep inside it the reason was found."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_ours(file: str) -> bool:
    return file.startswith(_PACKAGE) or file.endswith(_WRAPPERS)


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and a sign that there are more.

    >>> listed(["a", "b", "c", "d"]), listed(["a"])
    ('a, b, c …', 'a')
    """
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def nearest(name: str, known: Iterable[str], *, most: int = 3, cutoff: float = 0.4) -> list[str]:
    """The known names that look most like ``name``; of names that look like none, the first few.

    >>> nearest("keplora", ["lora", "keeplora", "gpm"], cutoff=0.6)
    ['keeplora', 'lora']
    """
    choices = list(known)
    return difflib.get_close_matches(name, choices, n=most, cutoff=cutoff) or choices[:most]


def suggest(name: str, known: Iterable[str]) -> str:
    """``". Did you mean 'x'?"`` when something close is known, else an empty string."""
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    return f". Did you mean {' or '.join(repr(other) for other in near)}?" if near else ""
