"""The workload that a configuration names: a benchmark, or the user's own tasks."""

from __future__ import annotations

from keeplora.tasks.catalog import load_workload, source
from keeplora.tasks.own import open_workload
from keeplora.tasks.workload import Workload
from keeplora.train.config import RunConfig

__all__ = ["configured_workload", "notes", "source_of"]


def configured_workload(config: RunConfig, device: str) -> Workload:
    """The tasks and the model of ``config``; `ConfigError` where they cannot be read."""
    return load_workload(config.benchmark, device) if config.own is None else open_workload(config.own, device)


def source_of(config: RunConfig) -> str | None:
    """A hash of what the data and the model of ``config`` are made of; None where only loading them tells."""
    return source(config.benchmark) if config.own is None else None


def notes(workload: Workload) -> list[str]:
    """What a user should know of the data before it is learned, where the workload tells."""
    told = getattr(workload, "notes", None)
    return [] if told is None else [*told(), ""]
