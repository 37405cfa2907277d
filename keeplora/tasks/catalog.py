"""Benchmarks by name: the folders of this package, and a function of one's own.

A folder is a benchmark, called as the folder with - for _, when its file ``workload.py`` has

* ``workload(device, *, small=False)``, which returns a ``Workload``; with ``small`` a
  part of it, for a look within minutes;
* ``NEEDS``, where it needs more than the package does: modules it imports, and the command that installs each;
* ``weights()``, where its weights are not in the folder: the files they are read from.

``workload.py`` and the folder's ``__init__.py`` import such a module inside the functions that use it, so that both can
be read without.
"""

from __future__ import annotations

import importlib
import pkgutil
import platform
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from keeplora._calls import named
from keeplora._made_of import made_of
from keeplora._messages import suggest
from keeplora.methods.settings import ConfigError
from keeplora.tasks.workload import Workload

__all__ = ["benchmarks", "load_workload", "missing_packages", "source"]

_SMALL = "-small"
_DECIDING = ("torch", "numpy", "safetensors", "open_clip_torch", "transformers", "tokenizers")
"""Whose versions may change the data or the pretrained model of a benchmark."""


def benchmarks() -> tuple[str, ...]:
    """Names of the benchmarks in the package, each followed by its small part. Nothing of them is imported.

    Examples:
        >>> benchmarks()
        ('clip-b16', 'clip-b16-small', 'embedded', 'embedded-small', 'minilm', 'minilm-small')
    """
    names = []
    for place in map(Path, sys.modules[__package__].__path__):
        folders = (entry.name for entry in pkgutil.iter_modules([str(place)]) if entry.ispkg)
        names += [name.replace("_", "-") for name in folders if (place / name / "workload.py").is_file()]
    return tuple(each for name in sorted(names) for each in (name, f"{name}{_SMALL}"))


@named
def load_workload(name: str, device: str = "cpu") -> Workload:
    """The benchmark called ``name``: one of [`benchmarks`][], or ``"package.module:function"``.

    A function outside the package is called with the device and returns a [`Workload`][].

    Raises:
        ConfigError: the name leads nowhere, what it leads to returns no workload, or the benchmark needs a package that
            is not installed (the command that installs it is told).
    """
    if not isinstance(name, str):
        raise TypeError(f"load_workload: name must be a benchmark's, got {name!r}. Known: {', '.join(benchmarks())}.")
    if name in benchmarks():
        absent = missing_packages(name)
        if absent:
            raise ConfigError(
                f"load_workload: benchmark {name!r} must have what it needs installed, got no {', '.join(absent)}. "
                f"Run {' && '.join(absent.values())}."
            )
        folder = name.removesuffix(_SMALL)
        workload = _module(folder).workload(device, small=name != folder)
    else:
        workload = _own_function(name)(device)
    if not isinstance(workload, Workload):
        raise ConfigError(f"load_workload: {name!r} must return a Workload, got {type(workload).__name__}")
    return workload


def missing_packages(name: str) -> dict[str, str]:
    """What a benchmark of the package needs and is not installed: modules, and the command that installs each.

    Of a benchmark of one's own nothing is known, and nothing is missing.
    """
    if name not in benchmarks():
        return {}
    needs: Mapping[str, str] = getattr(_module(name.removesuffix(_SMALL)), "NEEDS", {})
    return {module: command for module, command in needs.items() if find_spec(module) is None}


def source(name: str) -> str | None:
    """A hash of what a benchmark of the package is made of. Where it is as it was, so are the data and the model.

    Of the package's files, those that hold the weights, versions, and the kind of CPU, which may round pictures
    differently. Nothing is loaded. None for a benchmark of one's own, and where something it needs is missing: only
    loading it tells.
    """
    if name not in benchmarks() or missing_packages(name):
        return None
    weights: Callable[[], list[Path]] | None = getattr(_module(name.removesuffix(_SMALL)), "weights", None)
    files = [] if weights is None else weights()
    return made_of(_DECIDING, files, platform.machine(), torch.backends.cpu.get_cpu_capability())


def _module(folder: str) -> Any:
    return importlib.import_module(f"{__package__}.{folder.replace('-', '_')}.workload")


def _own_function(name: str) -> Any:
    known = benchmarks()
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(
            f"load_workload: benchmark must be one of {', '.join(known)} or 'package.module:function', "
            f"got {name!r}{suggest(name, known)}"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"load_workload: benchmark {name!r} must be importable: {error}. A module in the folder where the command "
            "is given, or on PYTHONPATH, is found"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(
            f"load_workload: benchmark must name a function of {module_name}, got {attribute!r}"
            f"{suggest(attribute, vars(module))}"
        )
    return getattr(module, attribute)
