"""Build keeplora._C and, with a CUDA toolkit, the CUDA kernels (keeplora/_cuda). Metadata is in pyproject.toml.

KEEPLORA_CUDA=0/1 leaves the CUDA part out or insists on it (default: where nvcc and a CUDA build of torch are).
KEEPLORA_CUDA_ARCHS names the GPU architectures (default "80,90a,100"). KEEPLORA_CUDA_COMPILED=1: _cuda is there.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pybind11
import torch
from setuptools import setup

ASKED = os.getenv("KEEPLORA_CUDA", "")
if ASKED != "0" and "CUDA_HOME" not in os.environ and (nvcc := shutil.which("nvcc")):
    # torch guesses the toolkit from the path of nvcc, which may be a link or a script; nvcc itself knows.
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    if top := re.search(r"TOP=(.*)", plan):
        os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def toolkit() -> str:
    """Version of the CUDA toolkit to build with, or "" to build without; SystemExit where one was insisted on."""
    nvcc, version = Path(CUDA_HOME or "", "bin", "nvcc"), ""
    if ASKED != "0" and torch.version.cuda and nvcc.exists():
        version = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))[1]
    if version and version.split(".")[0] == torch.version.cuda.split(".")[0]:
        return version
    problem = f"keeplora: no CUDA kernels: {nvcc} is {version or 'missing'}, torch {torch.__version__}. "
    problem += "Set CUDA_HOME to a toolkit of torch's major version, or KEEPLORA_CUDA=0."
    if ASKED == "1":
        raise SystemExit(problem)
    print(problem)
    return ""


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


cuda = toolkit()
archs = os.getenv("KEEPLORA_CUDA_ARCHS", "80,90a,100").split(",") if cuda else []
ops = {room: ",".join(Path(path).stem for path in sources(f"bind/{room}/*.cpp")) for room in ("cpu", "cuda")}
facts = {"TORCH": torch.__version__, "CUDA": cuda, "ARCHS": ",".join(archs), "CPU": ops["cpu"], "KERNELS": ops["cuda"]}
common = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020B000000000000"]  # loads under torch 2.11 and later
cxx = [*common, "-fvisibility=hidden", *(f"-DKEEPLORA_BUILT_{name}={value}" for name, value in facts.items())]
codes = [(arch, f"sm_{arch}") for arch in archs] + [(arch, f"compute_{arch}") for arch in archs[-1:] if arch.isdigit()]
nvcc = [*common, *(f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes)]  # the last for newer GPUs, too
host = {"include_dirs": [str(Path("csrc").resolve()), pybind11.get_include()], "extra_compile_args": cxx}
modules = [CppExtension("keeplora._C", sources("module.cpp", "bind/cpu/*.cpp"), **host)]
if cuda and os.getenv("KEEPLORA_CUDA_COMPILED") != "1":
    files, flags = sources("bind/cuda/*.cpp", "kernels/*.cu"), {"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc}
    modules.append(CUDAExtension("keeplora._cuda", files, **{**host, "extra_compile_args": flags}))
    runtime = f":libcudart.so.{cuda.split('.')[0]}"  # in NVIDIA's wheels it has no other name
    modules[1].libraries = [runtime if library == "cudart" else library for library in modules[1].libraries]
setup(ext_modules=modules, cmdclass={"build_ext": BuildExtension})
