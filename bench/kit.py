"""What a machine with a GPU would have to compile or lacks, made here: python -m bench.kit [FOLDER]

Into build/gpu-kit go this checkout's keeplora/_cuda, the programs that bench/gpu.sh builds with nvcc, wheels of the
Python packages, and kit.json, which says what it was made from: what is compiled is used for exactly these sources.
Copy the folder to the same place there. Needs nvcc and a build of the checkout with CUDA.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "gpu-kit"
WHEELS = ("open_clip_torch==3.3.0", "ftfy", "wcwidth", "peft>=0.21")  # the image of a GPU machine may lack them
PYTHON = "3.12"
PROGRAMS = {
    "conformance": ("-O2", "-I", "csrc", "-I", "tests/csrc", "tests/csrc/conformance/conformance.cu"),
    "mma_peak": ("-O3", "-I", "csrc", "bench/mma_peak.cu"),
}
LIBRARY = "_cuda.so"


@dataclass(frozen=True)
class Kit:
    """What kit.json says."""

    commit: str
    sources: str  # the hash of csrc and of its tests
    cuda: str  # the toolkit's version
    archs: tuple[str, ...]


def sources_hash(root: Path = ROOT) -> str:
    """The hash over the kernels and their tests that the proof of the kernels uses."""
    spec = importlib.util.spec_from_file_location("proof", root / "tests" / "csrc" / "proof.py")
    assert spec is not None
    assert spec.loader is not None
    proof = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(proof)
    found: str = proof.tree_hash(root)
    return found


def read(folder: Path = FOLDER) -> Kit | None:
    """The kit in ``folder``; None where there is none."""
    path = folder / "kit.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    return Kit(**{**content, "archs": tuple(content["archs"])})


def compile_command(nvcc: str, arch: str, name: str, program: Path) -> list[str]:
    """How one of the programs is built."""
    return [nvcc, "-std=c++20", f"-gencode=arch=compute_{arch},code=sm_{arch}", *PROGRAMS[name], "-o", str(program)]


def make(
    folder: Path, *, nvcc: str, arch: str, commit: str, library: Path, info: dict[str, object],
    run: Callable[..., object] = subprocess.check_call,
) -> Kit:  # fmt: skip
    """Fill ``folder``. ``info`` is what ``keeplora.ops.build_info`` says of ``library``."""
    if info["cuda"] is None or arch not in info["archs"]:  # type: ignore[operator]
        raise SystemExit(
            f"bench.kit: this build must have kernels for {arch}, got CUDA {info['cuda']} for {info['archs']}. "
            f"Build with KEEPLORA_CUDA=1 KEEPLORA_CUDA_ARCHS={arch}."
        )
    newest = max((ROOT / "csrc").rglob("*"), key=lambda path: path.stat().st_mtime)
    if library.stat().st_mtime < newest.stat().st_mtime:
        raise SystemExit(
            f"bench.kit: {library.name} must be newer than the sources, got older than {newest}. Rebuild it."
        )
    if folder.exists():
        shutil.rmtree(folder)
    (folder / "wheels").mkdir(parents=True)
    shutil.copy(library, folder / LIBRARY)
    for name in PROGRAMS:
        run(compile_command(nvcc, arch, name, folder / name), cwd=ROOT)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    run([*download, "--python-version", PYTHON, "-d", str(folder / "wheels"), *WHEELS], cwd=ROOT)
    kit = Kit(commit, sources_hash(), str(info["cuda"]), tuple(info["archs"]))  # type: ignore[arg-type]
    (folder / "kit.json").write_text(json.dumps(asdict(kit), indent=1) + "\n")
    return kit


def main() -> None:
    from bench.gpu import tool
    from bench.run import commit
    from keeplora.ops.compiled import build_info, library

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    kit = make(folder, nvcc=tool("nvcc"), arch="90a", commit=commit(ROOT), library=library("cuda"), info=build_info())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB for {', '.join(kit.archs)}, of commit {kit.commit}")


if __name__ == "__main__":
    main()
