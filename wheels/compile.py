"""The libraries and how they are compiled, with torch's own tools for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from setuptools import Extension
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

from wheels import plan

ROOT = Path(__file__).resolve().parents[1]


class Build(BuildExtension):  # type: ignore[misc]
    """torch's, with file names of no Python version, and what to do where a compiler fails."""

    def run(self) -> None:
        try:
            super().run()
        except Exception:
            print("keeplora: compiling failed. KEEPLORA_CPU=0 installs without kernels: ops run their references.")
            raise


def extensions(sources: Callable[..., list[str]]) -> tuple[list[Extension], type, plan.Built]:
    """The libraries, the command that builds them, and what is to be said of them."""
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    toolkit = plan.toolkit_of(nvcc)
    without = plan.why_no_cuda(torch, nvcc, toolkit, gpu=torch.version.cuda is not None and torch.cuda.is_available())
    archs = () if without else tuple(os.getenv("KEEPLORA_CUDA_ARCHS", "80,90a,100").split(","))
    ops = {room: tuple(Path(path).stem for path in sources(f"bind/{room}/*.cpp")) for room in ("cpu", "cuda")}
    built = plan.Built(
        torch=torch.__version__,
        cuda=None if without else toolkit,
        archs=archs,
        kernels=() if without else ops["cuda"],
        cpu_kernels=ops["cpu"],
        without_cuda=without,
    )
    oldest = "-DTORCH_TARGET_VERSION=0x{:02X}{:02X}000000000000".format(*plan.OLDEST_TORCH)
    common = ["-O3", "-std=c++20", oldest, "-include", str(ROOT / "csrc" / "old_glibc.h")]
    hidden = ["-g0", "-fvisibility=hidden", *_without_paths()]
    cpu = ["cpu_level.cpp", "bind/cpu/*.cpp"]
    modules = [_library(CppExtension, "_cpu", sources(*cpu), {"cxx": [*common, *hidden]})]
    if not without and os.getenv("KEEPLORA_CUDA_COMPILED") != "1":
        codes = [(arch, f"sm_{arch}") for arch in archs]
        codes += [(arch, f"compute_{arch}") for arch in archs[-1:] if arch.isdigit()]  # for newer GPUs, too
        gencode = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes]
        flags = {"cxx": [*common, *hidden, "-DUSE_CUDA"], "nvcc": [*common, *gencode]}
        kernels = _library(CUDAExtension, "_cuda", sources("bind/cuda/*.cpp", "kernels/*.cu"), flags)
        runtime = f":libcudart.so.{toolkit.split('.')[0]}"  # in NVIDIA's wheels it has no other name
        kernels.libraries = [runtime if library == "cudart" else library for library in kernels.libraries]
        modules.append(kernels)
    return modules, Build.with_options(no_python_abi_suffix=True), built


def _library(kind: Callable[..., Extension], name: str, files: list[str], flags: dict[str, list[str]]) -> Extension:
    include = [str(ROOT / "csrc")]
    # Not torch_python, and nothing of Python.
    return kind(f"keeplora.{name}", files, include_dirs=include, extra_compile_args=flags, py_limited_api=True)


def _without_paths() -> list[str]:
    """Errors name a file as it is included, not where it lay."""
    places = {str(ROOT): "keeplora", str(Path(torch.__file__).parent / "include"): "include"}
    return [f"-ffile-prefix-map={place}={name}" for place, name in places.items()]
