"""Modules of one's own that register something when they are imported: a method, a family of models."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence

from keeplora.methods.settings import ConfigError

__all__ = ["join_plugins", "load_plugins"]

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def join_plugins(names: object, more: Sequence[str] | None = None) -> tuple[str, ...]:
    """Both lists of modules as one, each name once; ``names`` may be whatever a TOML file has there.

    Raises:
        ConfigError: ``names`` is no list of names such as ``package.module``.
    """
    joined: list[str] = []
    for name in [*names, *(more or ())] if isinstance(names, list | tuple) else [names]:
        if not isinstance(names, list | tuple) or not isinstance(name, str) or not _MODULE.fullmatch(name):
            raise ConfigError(f'load_plugins: plugins must be a list of modules, as ["my_methods"], got {name!r}')
        joined += [name] if name not in joined else []
    return tuple(joined)


def load_plugins(names: Sequence[str]) -> None:
    """Import the modules ``names``, in this order. Every process of a run does it, before it looks up any name.

    Raises:
        ConfigError: there is no such module, or it imports something that is not there. Any other error in a module is
            its own, and comes as it is.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"load_plugins: plugins must be importable modules, got {name!r}: {error}. A module in the folder "
                "where the command is given, or on PYTHONPATH, is found"
            ) from error
