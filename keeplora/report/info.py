"""What is installed: versions, compiled kernels, methods, benchmarks."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Mapping
from importlib.util import find_spec

import torch

from keeplora._made_of import version
from keeplora._version import __version__
from keeplora.compare.comparison import shipped_comparisons
from keeplora.methods import METHODS
from keeplora.methods.settings import ConfigError
from keeplora.ops import build_info
from keeplora.ops.declare import OPS
from keeplora.tasks.catalog import benchmarks
from keeplora.train.config import RunConfig, shipped_configs
from keeplora.train.config_checks import BOTH
from keeplora.train.trackers import PACKAGES

_PACKAGES = ("torch", "numpy", "safetensors", "open_clip_torch", "matplotlib", "scipy", "tensorboard", "peft")


def check_machine(config: RunConfig) -> None:
    """Refuse a run that could not end here: a library or a GPU that is missing, before hours are spent.

    What the benchmark needs is asked where it is loaded.

    Raises ``ConfigError`` with what to install or change.
    """
    needed = {"matplotlib": "matplotlib"}
    if config.tensorboard:
        needed["tensorboard"] = "tensorboard"
    if config.evaluate_on == BOTH:  # paired tests
        needed["scipy"] = "scipy"
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"check_machine: {', '.join(missing)} must be installed for this run, got none. "
            "Run pip install 'keeplora[demo]'."
        )
    absent = [tracker for tracker in config.trackers if find_spec(tracker) is None]
    if absent:
        raise ConfigError(
            f"check_machine: what trackers name must be installed, got no {', '.join(absent)}. "
            f"Run pip install {' '.join(PACKAGES[tracker] for tracker in absent)}"
        )
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f'check_machine: device must be usable here, got {config.device!r} without CUDA. Set "cpu".')


def describe() -> str:
    """A text of a few lines, for people and for bug reports."""
    built = build_info()
    kernels = {"CPU": built["cpu_kernels"] or (), "CUDA": built["kernels"] or ()}
    lines = [
        f"keeplora {__version__} on Python {platform.python_version()}, {platform.platform()}",
        "",
        "packages    " + ", ".join(f"{name} {version(name) or 'not installed'}" for name in _PACKAGES),
        f"CPU         {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        f"CUDA        {_cuda()}",
        *_compiled(built),
        "ops         " + ", ".join(f"{name} ({_kernels(kernels, name)})" for name in OPS),
        "",
        "methods",
        *(f"  {name:<{max(map(len, METHODS))}}  {entry.summary}" for name, entry in METHODS.items()),
        "",
        "benchmarks  " + ", ".join(benchmarks()) + ", or your own as package.module:function",
        "configs     " + ", ".join(shipped_configs()),
        "comparisons " + ", ".join(shipped_comparisons()),
    ]
    return "\n".join(lines)


def _kernels(kernels: Mapping[str, Collection[str]], op: str) -> str:
    return " and ".join(f"{device} kernel" for device in kernels if op in kernels[device]) or "reference"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no GPU is visible to torch" if torch.version.cuda else "this torch has no CUDA"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}), torch has CUDA {torch.version.cuda}"


def _compiled(built: Mapping[str, str | list[str] | None]) -> list[str]:
    """What is compiled, and why the rest is not."""
    if built["without_cpu"]:
        return [f"kernels     none: pure Python, every op runs its reference; {built['without_cpu']}"]
    lines = [f"kernels     for the CPU, compiled with torch {built['torch']} for torch >= {built['torch_target']}"]
    if built["without_cuda"]:
        return [*lines, f"            none for CUDA, ops on a GPU run their references: {built['without_cuda']}"]
    return [*lines, f"            for CUDA {built['cuda']}, {', '.join(f'sm_{arch}' for arch in built['archs'] or ())}"]
