"""Values of a settings file that a run can write down again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keeplora.methods.settings import ConfigError, ConfigTypeError
from keeplora.tasks.own.broken import broken

__all__ = ["check_plain"]


def check_plain(value: Any, name: str, *, where: str) -> None:
    """Values that JSON has, and texts that UTF-8 and file systems have; TOML and YAML have others, such as dates."""
    if isinstance(value, Mapping):
        for key, held in value.items():
            if not isinstance(key, str):
                raise ConfigTypeError(f"load_config: names of settings must be text, got {key!r} in {where}")
            check_plain(key, "a name of a setting", where=where)
            check_plain(held, f"{name}.{key}" if name else key, where=where)
    elif isinstance(value, list | tuple):
        for held in value:
            check_plain(held, name, where=where)
    elif isinstance(value, str):
        if why := broken(value):
            raise ConfigError(f"load_config: {name} must be text that can be read, got {why} in {where}: {value!r}")
    elif value is not None and not isinstance(value, bool | int | float):
        raise ConfigTypeError(
            f"load_config: {name} must be a number, a text, true or false, a list or a table, got "
            f"{type(value).__name__} {value!r} in {where}"
        )
