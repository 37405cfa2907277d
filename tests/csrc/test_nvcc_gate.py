"""Every kernel compiles for every GPU architecture of a release, without spills or local memory. Needs no GPU."""

import re
import subprocess

import pytest
from csrc.programs import CSRC, HERE, ROOT, find_nvcc

# Indexing a local array by a run-time number needs a stack frame; the second function needs none.
FRAMED = """
template <int kSize>
__global__ void framed(float* x, int n) {
  float local[kSize] = {};
  for (int i = 0; i < n; ++i) local[static_cast<int>(x[i]) % kSize] += x[i];
  for (int i = 0; i < kSize; ++i) x[i] = local[i];
}
__global__ void plain(float* x) { __shared__ float sum[8]; sum[threadIdx.x % 8] = *x; __syncthreads(); *x = sum[0]; }
template __global__ void framed<64>(float*, int);
"""


def gate(out, arch, *options):
    """Exit status and report of the gate."""
    options = [f"-DNVCC={find_nvcc()}", f"-DOUT={out}", f"-DARCHS={arch}", *options]
    command = ["cmake", *options, "-P", str(HERE / "nvcc_gate.cmake")]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def flat(report):
    """CMake breaks the lines of its errors."""
    return " ".join(report.split())


@pytest.mark.proof
@pytest.mark.parametrize("arch", ["80", "90a", "100"])
def test_kernels_compile_without_spills(tmp_path, arch):
    status, report = gate(tmp_path, arch)
    assert status == 0, report
    kernels = [path.stem for path in (CSRC / "kernels").glob("*.cu")]
    table = (tmp_path / "kernels.md").read_text()
    assert kernels
    for kernel in kernels:
        lines = [line for line in report.splitlines() if line.startswith(f"{kernel} sm_{arch} ")]
        assert lines
        assert f"| {kernel} | sm_{arch} | {len(lines)} |" in table


@pytest.fixture
def framed(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "bad.cu").write_text(FRAMED)
    return tmp_path


def gate_with(framed, listed):
    (framed / "allowed.txt").write_text(listed)
    return gate(framed, "80", f"-DCSRC={framed}", f"-DALLOWED={framed / 'allowed.txt'}")


def test_gate_refuses_a_frame_that_is_not_listed(framed):
    status, report = gate_with(framed, "")
    assert status != 0
    assert "spills or stack frames in: bad sm_80 framed<64>" in flat(report)
    [line] = [line for line in report.splitlines() if line.startswith("bad sm_80 framed<64>: ")]
    assert "registers, 0 bytes static shared memory, 256 bytes stack frame, 0 bytes spills" in line
    assert "bad sm_80 plain: " in report
    assert "32 bytes static shared memory, 0 bytes stack frame" in report


def test_gate_lets_a_listed_frame_pass(framed):
    listed = (
        "# the list\nbad sm_80 framed<64 # a test\nbad sm_100 framed<64 # of another GPU, which is not looked at here\n"
    )
    status, report = gate_with(framed, listed)
    assert status == 0, report
    row = r"\| bad \| sm_80 \| 2 \| \d+ to \d+ \| 32 bytes \| 256 bytes \|"
    assert re.search(row, (framed / "kernels.md").read_text())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bad sm_80 plain # once needed", "excuses what needs no excuse: bad sm_80 plain # once needed"),
        ("other sm_80 framed # a kernel that is gone", "excuses what needs no excuse"),
        ("bad sm_80 framed<64", "must be 'name sm_arch function # reason', got: bad sm_80 framed<64"),
        ("bad sm_80 framed<64 #", "must be 'name sm_arch function # reason'"),
    ],
    ids=["stale", "gone", "no reason", "empty reason"],
)
def test_gate_refuses_a_bad_excuse(framed, line, message):
    status, report = gate_with(framed, f"bad sm_80 framed<64 # a test\n{line}\n")
    assert status != 0
    assert message in flat(report)


def test_table_in_the_documentation_names_every_kernel():
    text = (ROOT / "docs" / "kernels.md").read_text()
    for path in (CSRC / "kernels").glob("*.cu"):
        assert all(f"| {path.stem} | sm_{arch} |" in text for arch in ("80", "90a", "100")), path.stem
