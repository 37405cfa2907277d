"""What the values of a run's settings must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from keeplora.methods.settings import (
    SEEDS,
    ConfigError,
    ConfigTypeError,
    check_choice,
    check_flag,
    check_name,
    check_range,
    check_whole,
)  # fmt: skip
from keeplora.train.trackers import TRACKERS

if TYPE_CHECKING:
    from keeplora.train.config import RunConfig

BOTH = "both"
PRECISIONS = ("auto", "bf16", "fp32")
SCHEDULES = ("one-cycle", "cosine")
SWITCH_ORDERS = ("shuffled", "evenly")
EVALUATED_SPLITS = ("test", "validation", BOTH)
DEVICES = ("cpu", "cuda")

__all__ = ["BOTH", "DEVICES", "EVALUATED_SPLITS", "PRECISIONS", "SCHEDULES", "SWITCH_ORDERS", "validate"]


def validate(config: RunConfig) -> None:
    """Refuse a value that a run could not work with; all that needs no data and no model."""
    check_name(config, "benchmark")
    check_name(config, "out")
    for name in ("methods", "seeds"):
        _check_list(config, name)
    for label in config.methods:
        check_name(config, "methods", value=label)
        if not all(c.isalnum() or c in "+-_.@" for c in label):
            raise ConfigError(f"RunConfig: methods must be names of letters, digits and + - _ . @, got {label!r}")
    for seed in config.seeds:
        check_whole(config, "seeds", SEEDS, value=seed)
    for name in ("methods", "seeds"):
        entries = getattr(config, name)
        if len(set(entries)) < len(entries):
            raise ConfigError(f"RunConfig: {name} must have no entry twice, got {list(entries)}")
    given = [name for name in ("epochs", "steps") if getattr(config, name) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"RunConfig: exactly one of epochs and steps must be given, got {' and '.join(given) or None}"
        )
    for name in given:
        numbers = getattr(config, name)
        if isinstance(numbers, tuple):
            _check_list(config, name)
        for number in numbers if isinstance(numbers, tuple) else (numbers,):
            check_whole(config, name, "[1, inf)", value=number)
    for name in ("batch_size", "evaluation_batch_size", "threads"):
        check_whole(config, name, "[1, inf)")
    for factor in config.rate_factors:
        check_range(config, "rate_factors", "(0, inf)", value=factor)
    check_choice(config, "schedule", SCHEDULES)
    check_range(config, "warmup", "[0, 1)")
    check_whole(config, "workers", "[0, inf)")
    check_choice(config, "precision", PRECISIONS)
    check_choice(config, "evaluate_on", EVALUATED_SPLITS)
    check_choice(config, "device", DEVICES)
    check_range(config, "weight_decay", "[0, inf)")
    check_range(config, "switch_fraction", "(0, 1]")
    check_choice(config, "switch_order", SWITCH_ORDERS)
    check_flag(config, "tensorboard")
    for tracker in config.trackers:
        check_choice(config, "trackers", TRACKERS, value=tracker)
    check_flag(config, "keep_states")
    check_flag(config, "reuse_evaluations")
    if not isinstance(config.every_method, Mapping):
        raise ConfigTypeError(f"RunConfig: every_method must be a table, got {config.every_method!r}")
    if config.every_method:
        rate = config.every_method.get("learning_rate")
        check_range(config, "every_method.learning_rate", "(0, inf)", value=rate)
    for label, entry in config.method.items():
        name = f"method.{label}"
        check_name(config, f"{name}.method", value=entry.method)
        check_range(config, f"{name}.learning_rate", "(0, inf)", value=entry.learning_rate)
        check_range(config, f"{name}.weight_decay", "[0, inf)", value=entry.weight_decay, optional=True)


def _check_list(config: RunConfig, name: str) -> None:
    entries = getattr(config, name)
    if not isinstance(entries, list | tuple):
        raise ConfigTypeError(f"RunConfig: {name} must be a list, got {entries!r}")
    if not entries:
        raise ConfigError(f"RunConfig: {name} must hold at least one entry, got {entries!r}")
