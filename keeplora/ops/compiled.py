"""Loads the compiled libraries, keeplora/_cpu.so and _cuda.so, and knows why there are none where ops have references.

They are no Python modules: they register kernels with torch's dispatcher, through torch's stable ABI. What they are is
in keeplora/_built.json, which every build writes. KEEPLORA_CPU=0 and KEEPLORA_CUDA=0 leave them unloaded.
"""

import ctypes
import json
import os
from functools import cache
from pathlib import Path

import torch

from keeplora._messages import warn

__all__ = ["build_info", "library", "limit_cpu_level"]

_PACKAGE = Path(__file__).parents[1]
_RECORD = _PACKAGE / "_built.json"
_Facts = dict[str, str | list[str] | None]


def library(device: str) -> Path:
    """Where the library with the kernels of a device is: ``"cpu"`` or ``"cuda"``."""
    return _PACKAGE / f"_{device}.so"


def build_info() -> dict[str, str | list[str] | None]:
    """Which kernels are compiled and loaded, and why others are not.

    Returns:
        ``torch``: the version they were compiled with; ``torch_target``: the oldest that they load under; ``cuda``:
        version of the CUDA toolkit, or None; ``archs``: GPU architectures; ``kernels`` and ``cpu_kernels``: ops with
        a compiled kernel for CUDA and for the CPU; ``without_cpu`` and ``without_cuda``: why there are none, ``""``
        where there are. Every other op runs its reference, which is written in torch.
    """
    return dict(_facts())


@cache
def _facts() -> _Facts:
    """What was built, less what cannot be used here."""
    facts: _Facts = {"torch": None, "torch_target": "2.11", "cpu_kernels": [], "without_cpu": ""}
    if _RECORD.exists():
        facts = json.loads(_RECORD.read_text(encoding="utf-8"))
    else:
        why = f"{_PACKAGE} was never built"
        facts = {**facts, "without_cpu": why, **_no_cuda(why)}
    if os.getenv("KEEPLORA_CPU") == "0" and facts["cpu_kernels"]:
        why = "KEEPLORA_CPU=0 is set"
        facts = {**facts, "cpu_kernels": [], "without_cpu": why, **_no_cuda(why)}
    if (cuda := facts["cuda"]) is not None:
        facts = {**facts, **_no_cuda(_why_no_cuda(str(cuda)))}
    return facts


def _no_cuda(why: str) -> _Facts:
    return {"cuda": None, "archs": [], "kernels": [], "without_cuda": why} if why else {}


def _why_no_cuda(built: str) -> str:
    """Why kernels of a CUDA toolkit are of no use with this torch, "" where they are."""
    here = torch.version.cuda
    if os.getenv("KEEPLORA_CUDA") == "0":
        return "KEEPLORA_CUDA=0 is set"
    if here is None:
        return "this torch has no CUDA"
    if here.split(".")[0] != built.split(".")[0]:
        return f"they are for CUDA {built}, and this torch has CUDA {here}"
    return ""


def _load() -> None:
    facts = _facts()
    if not _RECORD.exists():
        # Where Python is started in a checkout, the checkout comes before the installed package.
        warn(
            f"keeplora: {_PACKAGE} has no compiled kernels, so ops run their references. Install the checkout with "
            "pip install -e . or, if keeplora is installed, start Python in another folder."
        )
    elif "they are for" in str(facts["without_cuda"]) and torch.cuda.is_available():
        warn(f"keeplora: the CUDA kernels are not used: {facts['without_cuda']}. Ops on the GPU run their references.")
    for device, kernels in (("cpu", facts["cpu_kernels"]), ("cuda", facts["kernels"])):
        if kernels:
            _load_library(library(device), facts["torch"])


def _load_library(path: Path, built: object) -> None:
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        variable = "KEEPLORA_CPU" if path == library("cpu") else "KEEPLORA_CUDA"
        raise ImportError(
            f"keeplora: {path.name} must load into torch {torch.__version__}, got: {error}. It was compiled with torch "
            f"{built}. Install keeplora again, or set {variable}=0: ops then run their references."
        ) from error


def limit_cpu_level(level: int) -> int:
    """Let the CPU's kernels use vector instructions up to a level (csrc/bind/cpu/levels.h), for tests.

    Returns the level that they now use: 0 where no kernels are compiled.
    """
    if not _facts()["cpu_kernels"]:
        return 0
    answer: int = ctypes.CDLL(str(library("cpu"))).keeplora_limit_cpu_level(level)
    return answer


_load()
