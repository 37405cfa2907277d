"""Settings: what those of several methods have in common, and how wrong ones are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["AdapterConfig", "ConfigError", "check_range", "plain"]


class ConfigError(ValueError):
    """Settings that cannot be used; the message says which one and what to write instead."""


@dataclass(frozen=True)
class AdapterConfig:
    """Rank, ``alpha / r`` scaling (``alpha / sqrt(r)`` with rslora), and which layers.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    r: int = 16
    alpha: float = 16.0
    rslora: bool = False
    target_modules: tuple[str, ...] | str = ("attn",)

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r <= 0:
            raise ValueError(f"{type(self).__name__}: r must be an int of at least 1, got {self.r!r}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"{type(self).__name__}: alpha must be a positive number, got {self.alpha!r}")
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


def check_range(config: Any, name: str, low: float, high: float, *, closed: bool = True) -> None:
    """Refuse a setting outside [low, high], or [low, high) where not ``closed``.

    Raises:
        ValueError: the message names the config, the setting and its value.
    """
    value = getattr(config, name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (low <= value <= high and (closed or value < high)):
        bounds = f"[{low:g}, {high:g}{']' if closed and math.isfinite(high) else ')'}"
        raise ValueError(f"{type(config).__name__}: {name} must lie in {bounds}, got {value!r}")


def plain(config: Any) -> dict[str, Any]:
    """A settings dataclass as plain JSON values; its class makes it again of them.

    Example:
        >>> plain(AdapterConfig(r=2))
        {'r': 2, 'alpha': 16.0, 'rslora': False, 'target_modules': ['attn']}
    """
    values: dict[str, Any] = _plain(asdict(config))
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
