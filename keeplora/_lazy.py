"""Public names whose modules load when they are first asked for: they need an optional package, or take time."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

__all__ = ["Lazy", "lazy"]


class Lazy(NamedTuple):
    """Where a name is defined, the optional package that its module imports, and the command that installs it."""

    module: str
    needs: str = ""
    install: str = ""


def lazy(package: str, names: Mapping[str, Lazy]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` (PEP 562) of ``package``, which has ``names`` besides its own.

    A name whose optional package is missing raises ``ImportError`` with the command that installs it. ``dir()`` leaves
    it out, so that ``help()`` and other tools that read every attribute work without it.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            if not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
                return importlib.import_module(f"{package}.{name}")  # `import keeplora` is enough for keeplora.lora
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, needs, install = names[name]
        if needs and find_spec(needs) is None:
            raise ImportError(f"{package}.{name}: {needs} must be installed, got none. Run {install}.", name=needs)
        value = getattr(importlib.import_module(module), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        there = (name for name, entry in names.items() if not entry.needs or find_spec(entry.needs) is not None)
        return sorted({*vars(sys.modules[package]), *there})

    return __getattr__, __dir__
