"""Whose name a message begins with: that of the call the user made, not of the function inside that found a fault."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from keeplora._names import unknown_argument

__all__ = ["INNER", "PACKAGE", "in_words_of_the_call", "named", "public"]

PACKAGE = os.fspath(Path(__file__).parent) + os.sep
"""What the names of this package's files begin with."""

P = ParamSpec("P")
R = TypeVar("R")

INNER = frozenset(
    {
        "StartedAdapter", "add_slot", "ago_loss", "attach", "class_tokens", "export", "feature_statistics",
        "find_targets", "first_batches", "load_state", "mean_gradients", "nystrom", "of_rows", "processes",
        "put_class_head", "read_state", "require_no_head", "restore", "select_targets", "sketch_widths", "token_mask",
        "unwrap", "wrap", "write", "write_state",
    }
)  # fmt: skip
"""Functions that users seldom call themselves. Inside of a public call their messages begin with its name."""

_call: ContextVar[str | None] = ContextVar("_call", default=None)
_PREFIX = re.compile(r"(\w+): ")


def public(function: Callable[P, R]) -> Callable[P, R]:
    """A call that users make: messages of `INNER` functions in it begin with its name, a class's name if it makes one.

    Of calls inside of each other the outermost counts. What code of others says in the call is left as it is. Names of
    arguments are as in `named`.
    """
    known = named(function)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        outermost = _call.set(_call.get() or _name(function, args))
        try:
            return known(*args, **kwargs)
        except Exception as error:
            if error.args and isinstance(error.args[0], str) and _is_ours(error.__traceback__):
                error.args = (in_words_of_the_call(error.args[0]), *error.args[1:])
            raise
        finally:
            _call.reset(outermost)

    return called


def named(function: Callable[P, R]) -> Callable[P, R]:
    """A call that refuses an argument whose name it does not know with the name that was meant."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            made = args[0] if function.__name__ == "__init__" and args else None
            if told := unknown_argument(function, _name(function, args), kwargs, made):
                error.args = (told,)
            raise

    return called


def _name(function: Callable[..., object], args: tuple[object, ...]) -> str:
    """What the user has called: a class, if the function makes one."""
    return type(args[0]).__name__ if function.__name__ == "__init__" and args else function.__name__.lstrip("_")


def _is_ours(traceback: TracebackType | None) -> bool:
    """Whether a line of this package raised the error."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_code.co_filename.startswith(PACKAGE)


def in_words_of_the_call(message: str) -> str:
    """``message`` with the name of the public call that is running for that of an inner function, if it has one."""
    call, prefix = _call.get(), _PREFIX.match(message)
    return f"{call}: {message[prefix.end() :]}" if call and prefix and prefix[1] in INNER else message
