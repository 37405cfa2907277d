"""The wheel holds what a user needs: without CUDA as where there is no toolkit, and with it, built without a GPU."""

import os
import subprocess
import sys
import zipfile

import pytest
import torch
from packages import ROOT, TOOLKIT, build_wheel, other_torch, shipped_files

KERNELS = sorted(path.stem for path in (ROOT / "csrc" / "bind" / "cuda").glob("*.cpp"))


def run_unpacked(folder, *command, before=()):
    """Run Python where `keeplora` is the unpacked wheel and the folders of ``before`` come first."""
    path = os.pathsep.join(map(str, [folder, *before]))
    # A torch that is installed by itself does not find NVIDIA's libraries beside it.
    libraries = [*TOOLKIT.parent.glob("*/lib"), *(path for place in before for path in place.glob("nvidia/*/lib"))]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_without_cuda_has_the_extension_and_the_data(tmp_path):
    wheel = zipfile.ZipFile(build_wheel(tmp_path, KEEPLORA_CUDA="0"))
    names = set(wheel.namelist())
    assert any(name.startswith("keeplora/_C.") and name.endswith(".so") for name in names)
    assert not any(name.startswith("keeplora/_cuda") for name in names)
    wanted = [name for name in shipped_files() if name.startswith("keeplora/") and not name.endswith((".so", ".pyc"))]
    assert len(wanted) > 80
    assert not set(wanted) - names
    metadata = wheel.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert "Requires-Dist: torch>=2.11" in metadata


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A wheel with the CUDA kernels, built with the toolkit from PyPI for one architecture, unpacked."""
    assert (TOOLKIT / "bin" / "nvcc").exists(), f"no nvcc in {TOOLKIT}; pip install 'keeplora[dev]' brings one"
    folder = tmp_path_factory.mktemp("cuda")
    wheel = build_wheel(folder, KEEPLORA_CUDA="1", KEEPLORA_CUDA_ARCHS="90a", CUDA_HOME=str(TOOLKIT))
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


def test_wheel_with_cuda_is_built_and_loads_without_a_gpu(unpacked):
    assert len(list(unpacked.glob("keeplora/_cuda.*.so"))) == 1
    assert set(KERNELS) == {path.stem for path in (ROOT / "csrc" / "kernels").glob("*.cu")}
    code = (
        "import torch; from keeplora.ops import build_info; facts = build_info(); "
        "assert not torch.cuda.is_initialized(); "
        "assert facts['archs'] == ['90a'] and facts['cuda'].split('.')[0] == torch.version.cuda.split('.')[0], facts; "
        "has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        "print(*[name for name in facts['kernels'] if has(f'keeplora::{name}', 'CUDA')])"
    )
    assert run_unpacked(unpacked, "-c", code).split() == KERNELS
    assert "CUDA kernel" in run_unpacked(unpacked, "-m", "keeplora", "info")


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0", "installed"])
def test_one_binary_for_every_torch(unpacked, version):
    """The wheel built above, with the oldest torch that pyproject.toml allows, with another, and with the one here."""
    here = torch.__version__.split("+")[0]
    before = [] if version in ("installed", here) else [other_torch(version)]
    printed = run_unpacked(
        unpacked,
        ROOT / "tests" / "every_op.py",
        here if version == "installed" else version,
        *KERNELS,
        before=before,
    )
    assert printed.startswith("torch ")


def test_setup_stays_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 60
