"""Checks that the tables of a settings file share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from keeplora._messages import suggest
from keeplora.methods.settings import ConfigError, ConfigTypeError

__all__ = ["check_template", "check_texts", "made"]


def made(kind: Any, values: Any, table: str, where: str) -> Any:
    """A dataclass of a table; an unknown or a missing setting is named."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"load_config: {table} must be a table, got {values!r} in {where}")
    known = [entry.name for entry in fields(kind)]
    for name in values:
        if name not in known:
            raise ConfigError(
                f"load_config: every setting of {table} must be known, got {name!r} in {where}"
                f"{suggest(str(name), known, listing=True)}"
            )
    try:
        return kind(**values)
    except TypeError as error:  # a required one is missing
        if isinstance(error, ConfigTypeError):
            raise
        raise ConfigError(f"load_config: {table} in {where} is incomplete: {error}") from error


def check_texts(config: Any) -> None:
    """Refuse a dataclass of texts with something else in it."""
    for entry in fields(config):
        if not isinstance(value := getattr(config, entry.name), str):
            raise ConfigTypeError(f"{type(config).__name__}: {entry.name} must be text, got {value!r}")


def check_template(config: Any, template: Any) -> None:
    """Refuse what is no text with one place for the class."""
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ConfigError(
            f"{type(config).__name__}: template must have one {{}} for the class, got {template!r}. "
            'Write "a photo of a {}."'
        )
