"""How the package speaks to its user: warnings that point at the user's line, and names that were probably meant."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from types import FrameType

from keeplora._calls import PACKAGE, in_words_of_the_call
from keeplora._names import nearest, suggest

__all__ = ["add_note", "listed", "nearest", "suggest", "warn"]

_IMPORTING = "<frozen importlib."


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the user's line: the first one outside the package, however deep inside it the reason was found.

    Lines of torch and of contextlib are not the user's either: they come between where a layer is called or a function
    is decorated, with ``torch.no_grad`` for one.
    """
    level, frame = 1, sys._getframe()
    between = _between()
    while frame.f_back is not None and (frame.f_code.co_filename.startswith(between) or _is_generated(frame)):
        frame = frame.f_back
        if not frame.f_code.co_filename.startswith(_IMPORTING):  # warnings does not count these
            level += 1
    warnings.warn(in_words_of_the_call(message), category, stacklevel=level)


def _between() -> tuple[str, ...]:
    torch = sys.modules.get("torch")  # if it is there: not everything that speaks to users needs it
    folder = () if torch is None or torch.__file__ is None else (os.path.dirname(torch.__file__) + os.sep,)
    return (PACKAGE, _IMPORTING, contextlib.__file__, *folder)


def _is_generated(frame: FrameType) -> bool:
    """Whether this is the ``__init__`` that dataclasses write for a class of ours."""
    return frame.f_code.co_filename == "<string>" and str(frame.f_globals.get("__name__")).startswith("keeplora.")


def add_note(error: BaseException, note: str) -> None:
    """Add a line to an error that goes on its way. Python 3.10 shows no notes, so it becomes a part of the message."""
    note = in_words_of_the_call(note)
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        error.args = ("\n".join([*map(str, error.args[:1]), note]), *error.args[1:])


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and a sign that there are more.

    >>> listed(["a", "b", "c", "d"]), listed(["a"])
    ('a, b, c …', 'a')
    """
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")
