"""Benchmarks by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from keeplora._messages import suggest
from keeplora.methods.settings import ConfigError
from keeplora.tasks.workload import Workload


def load_workload(name: str, device: str = "cpu") -> Workload:
    """The benchmark called ``name``: one of :data:`BENCHMARKS`, or ``"package.module:function"``.

    A function outside the package is called with the device and returns a :class:`Workload`.
    Raises :class:`~keeplora.methods.settings.ConfigError` for a name that leads nowhere, or a package that is missing.
    """
    if name in BENCHMARKS:
        try:
            return BENCHMARKS[name](device)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"load_workload: benchmark {name!r} must have what it needs installed: {error}"
            ) from error
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(
            f"load_workload: benchmark must be one of {', '.join(BENCHMARKS)} or 'package.module:function', "
            f"got {name!r}{suggest(name, BENCHMARKS)}"
        )
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"load_workload: benchmark {name!r} must be importable: {error}") from error
    workload = factory(device)
    if not isinstance(workload, Workload):
        raise ConfigError(f"load_workload: {name!r} must return a Workload, got {type(workload).__name__}")
    return workload


def _embedded(device: str) -> Workload:
    from keeplora.tasks.embedded.workload import embedded_workload  # here, because it needs open_clip

    return embedded_workload(device)


def _embedded_small(device: str) -> Workload:
    from keeplora.tasks.embedded.workload import embedded_workload

    return embedded_workload(device, small=True)


def _minilm(device: str) -> Workload:
    from keeplora.tasks.minilm.workload import minilm_workload  # here, because it needs transformers

    return minilm_workload(device)


def _minilm_small(device: str) -> Workload:
    from keeplora.tasks.minilm.workload import minilm_workload

    return minilm_workload(device, small=True)


BENCHMARKS: dict[str, Callable[[str], Workload]] = {
    "embedded": _embedded,
    "embedded-small": _embedded_small,
    "minilm": _minilm,
    "minilm-small": _minilm_small,
}
"""Benchmarks by name; each is built for a device."""
