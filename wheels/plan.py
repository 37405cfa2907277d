"""What a build compiles here, and why it leaves the rest out. Imports no torch: pip asks before there is one."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

OLDEST_TORCH = (2, 11)


def why_pure(environ: Mapping[str, str] = os.environ, system: str = "") -> str:
    """Why nothing can be compiled here, "" where it can. SystemExit where KEEPLORA_CPU=1 insists on compiling."""
    system = system or platform.system()
    compiler = shlex.split(environ.get("CXX", "")) or ["c++"]
    if environ.get("KEEPLORA_CPU") == "0":
        return "built with KEEPLORA_CPU=0"
    if system != "Linux":
        why = f"kernels are compiled on Linux alone, and this is {system}"
    elif shutil.which(compiler[0], path=environ.get("PATH")) is None:
        why = f"no C++ compiler: {compiler[0]} is not in PATH"
    else:
        return ""
    return _refused("KEEPLORA_CPU", why, environ)


def why_no_cuda(
    torch: ModuleType, nvcc: Path, toolkit: str, environ: Mapping[str, str] = os.environ, *, gpu: bool
) -> str:
    """Why no CUDA kernels are compiled, "" where they are. SystemExit where KEEPLORA_CUDA=1 insists on them.

    ``toolkit`` is the version of ``nvcc``, "" where there is none.
    """
    asked = environ.get("KEEPLORA_CUDA", "")
    if asked == "0":
        return "built with KEEPLORA_CUDA=0"
    if not gpu and asked != "1":
        return "no NVIDIA GPU was visible to the build; KEEPLORA_CUDA=1 compiles them all the same"
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} has no CUDA"
    elif not toolkit:
        why = f"{nvcc} is missing; set CUDA_HOME"
    elif toolkit.split(".")[0] != torch.version.cuda.split(".")[0]:
        why = f"{nvcc} is {toolkit}, and torch has CUDA {torch.version.cuda}; set CUDA_HOME to that major version"
    else:
        return ""
    return _refused("KEEPLORA_CUDA", why, environ)


def _refused(variable: str, why: str, environ: Mapping[str, str]) -> str:
    if environ.get(variable) == "1":
        raise SystemExit(f"keeplora: {variable}=1 asks for kernels that cannot be compiled here: {why}.")
    return why


def find_torch() -> list[str] | None:
    """What to add to sys.path, so that torch can be imported: often nothing. None where there is no torch >= 2.11.

    pip hides the packages of the environment it installs into. The same Python, started anew, sees them.
    """
    if _has_torch(sys.path):
        return []
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    command = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    answer = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    outside: list[str] = json.loads(answer)
    return [path for path in outside if path not in sys.path] if _has_torch(outside) else None


def _has_torch(path: list[str]) -> bool:
    found = next(iter(metadata.distributions(name="torch", path=path)), None)
    return found is not None and tuple(map(int, found.version.split(".")[:2])) >= OLDEST_TORCH


def toolkit_of(nvcc: Path) -> str:
    """The version of nvcc, "" where there is none."""
    if not nvcc.exists():
        return ""
    answer = subprocess.check_output([nvcc, "--version"], text=True)
    return re.search(r"release ([\d.]+)", answer)[1]  # type: ignore[index]


def point_to_toolkit() -> None:
    """Set CUDA_HOME from nvcc in PATH. torch guesses it from nvcc's path, which may be a link or a script."""
    if os.getenv("KEEPLORA_CUDA") != "0" and "CUDA_HOME" not in os.environ and (nvcc := shutil.which("nvcc")):
        answer = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        if top := re.search(r"TOP=(.*)", answer):
            os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())


@dataclass(frozen=True)
class Built:
    """What _built.json, beside the libraries, says of them."""

    torch: str | None = None
    torch_target: str = ".".join(map(str, OLDEST_TORCH))
    cuda: str | None = None
    archs: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    cpu_kernels: tuple[str, ...] = ()
    without_cpu: str = ""
    without_cuda: str = ""

    def __str__(self) -> str:
        if self.without_cpu:
            return f"keeplora: pure Python, ops run their references: {self.without_cpu}."
        cuda = f"no CUDA kernels: {self.without_cuda}" if self.without_cuda else f"CUDA for {', '.join(self.archs)}"
        return f"keeplora: kernels for the CPU are compiled with torch {self.torch}; {cuda}."
