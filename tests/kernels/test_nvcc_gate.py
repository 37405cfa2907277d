"""Every kernel compiles for every GPU architecture of a release, without spills or local memory. Needs no GPU."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def find_nvcc():
    """A toolkit's nvcc, or the one that NVIDIA's wheels on PyPI put into site-packages."""
    places = [Path(os.getenv("CUDA_HOME", "/usr/local/cuda"), "bin")]
    places.append(Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin"))
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], *map(str, places)]))
    assert nvcc, "no nvcc, so no kernel can be compiled for a GPU; pip install 'keeplora[dev]' brings one"
    return nvcc


def test_kernels_compile_without_spills(tmp_path):
    nvcc = find_nvcc()
    gate = [
        "cmake",
        f"-DNVCC={nvcc}",
        f"-DCSRC={ROOT / 'csrc'}",
        f"-DOUT={tmp_path}",
        "-P",
        ROOT / "csrc/nvcc_gate.cmake",
    ]
    done = subprocess.run(gate, capture_output=True, text=True)
    report = done.stdout + done.stderr
    print(report)
    assert done.returncode == 0, report
    kernels = [path.stem for path in (ROOT / "csrc" / "kernels").glob("*.cu")]
    assert all(f"{kernel} sm_{arch}: registers" in report for kernel in kernels for arch in ("80", "90a", "100"))


def test_gate_refuses_spills(tmp_path):
    """A kernel that indexes a local array by a run-time number needs a stack frame."""
    nvcc = find_nvcc()
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "bad.cu").write_text(
        "__global__ void bad(float* x, int n) {\n"
        "  float local[64] = {};\n"
        "  for (int i = 0; i < n; ++i) local[static_cast<int>(x[i]) & 63] += x[i];\n"
        "  for (int i = 0; i < 64; ++i) x[i] = local[i];\n"
        "}\n"
    )
    gate = ["cmake", f"-DNVCC={nvcc}", f"-DCSRC={tmp_path}", f"-DOUT={tmp_path}", "-P", ROOT / "csrc/nvcc_gate.cmake"]
    done = subprocess.run(gate, capture_output=True, text=True)
    assert done.returncode != 0
    assert "spills or stack frames in: bad sm_80" in done.stdout + done.stderr
