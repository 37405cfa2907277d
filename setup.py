"""Builds keeplora/_cpu.so and, with CUDA, keeplora/_cuda.so: libraries that depend on torch's stable ABI alone.

KEEPLORA_CPU=0 compiles nothing; KEEPLORA_CUDA=0/1 leaves the CUDA part out or insists on it (default: where a GPU is
visible); KEEPLORA_CUDA_ARCHS names the architectures (default "80,90a,100"); KEEPLORA_CUDA_COMPILED=1: _cuda is there.
wheels/plan.py decides. Metadata is in pyproject.toml.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

from wheels import plan


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def recording(command: type) -> type:
    """The command, which also writes down what is built: both, because a build without kernels has no build_ext."""

    class Recording(command):
        def run(self) -> None:
            super().run()
            in_place = getattr(self, "inplace", False) or getattr(self, "editable_mode", False)
            folder = Path("keeplora") if in_place else Path(self.build_lib, "keeplora")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_built.json").write_text(json.dumps(asdict(built), indent=1) + "\n")

    return Recording


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # nothing that is compiled knows Python


pure, places = plan.why_pure(), plan.find_torch()
if not pure and places is None:
    pure = "no torch >= {}.{} to compile with; install torch first".format(*plan.OLDEST_TORCH)
modules, commands = [], {"build_py": recording(build_py), "bdist_wheel": Wheel}
if pure:
    built = plan.Built(without_cpu=pure, without_cuda=pure)
else:
    sys.path += places
    plan.point_to_toolkit()
    from wheels.compile import extensions

    modules, build_ext, built = extensions(sources)
    commands["build_ext"] = recording(build_ext)
print(built)
setup(ext_modules=modules, cmdclass=commands)
