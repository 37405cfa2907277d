"""Builds keeplora for this machine's GPU in the checkout: python -m bench.gpu_build ARCH

The kernels come from build/gpu-kit where they were compiled from these sources for this GPU and load here; else they
are compiled. The rest takes half a minute.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench import kit

CHECK = "import torch, keeplora.ops as ops; print(ops.build_info()); assert ops.build_info()['cuda']"


def why_not(found: kit.Kit | None, arch: str, sources: str) -> str:
    """Why the kernels of a kit do not fit; "" where they do."""
    if found is None:
        return "there is no kit"
    if found.sources != sources:
        return "it was made from other sources"
    if arch not in found.archs:
        return f"it is for {', '.join(found.archs)}, and this GPU is {arch}"
    return ""


def build(folder: Path, arch: str, run: Callable[..., int] = subprocess.call, root: Path = kit.ROOT) -> int:
    """Build with the kit's kernels if they fit and load, else with all that is compiled here; the exit status."""

    def built(**settings: str) -> int:
        environment = {**os.environ, "KEEPLORA_CUDA": "1", "KEEPLORA_CUDA_ARCHS": arch, **settings}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        return run(command, env=environment, cwd=root) or run([sys.executable, "-c", CHECK], cwd=root)

    reason = why_not(kit.read(folder), arch, kit.sources_hash())
    if not reason:
        shutil.copy(folder / kit.LIBRARY, root / "keeplora" / kit.LIBRARY)
        if built(KEEPLORA_CUDA_COMPILED="1") == 0:
            print("the kernels are the kit's", flush=True)
            return 0
        reason = "it does not build or load here"
    print(f"the kernels are compiled here: {reason}", flush=True)
    return built(KEEPLORA_CUDA_COMPILED="0")


if __name__ == "__main__":
    raise SystemExit(build(kit.FOLDER, sys.argv[1]))
