"""Whose name a message begins with: that of the call the user made, not of the function inside that found a fault."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

__all__ = ["INNER", "in_words_of_the_call", "public"]

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

    Of calls inside of each other the outermost counts.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        name = function.__name__
        outermost = _call.set(_call.get() or (type(args[0]).__name__ if name == "__init__" else name))
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if error.args and isinstance(error.args[0], str):
                error.args = (in_words_of_the_call(error.args[0]), *error.args[1:])
            raise
        finally:
            _call.reset(outermost)

    return called


def in_words_of_the_call(message: str) -> str:
    """``message`` with the name of the public call that is running for that of an inner function, if it has one."""
    call, prefix = _call.get(), _PREFIX.match(message)
    return f"{call}: {message[prefix.end() :]}" if call and prefix and prefix[1] in INNER else message
