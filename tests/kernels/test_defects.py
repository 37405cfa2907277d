"""The tests of the emulated kernels must be able to fail: each planted defect has to be caught.

Every barrier and every bounds check of a kernel is taken out in turn. The mutated sources are built by the project's
own CMakeLists.txt; the program that passes on the real sources must then fail.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Defect:
    name: str
    file: str  # in csrc/kernels
    find: str
    put: str
    build: str = "emulate"  # the build that must catch it; "emulate_sanitized" for reads outside an array


DEFECTS = [
    Defect("sums before all partial sums are there", "project_rows.cu", "__syncthreads();  // all partial", "// all"),
    Defect("products used before complete", "project_rows.cu", "__syncthreads();  // products complete", "//"),
    Defect("rows read while being written", "project_rows.cu", "__syncthreads();  // out is read", "//"),
    Defect("block sum before all warps wrote", "project_rows.cu", "__syncthreads();  // every warp", "//"),
    Defect("threads at different barriers", "project_rows.cu", "__syncthreads();  // every warp",
           "if (threadIdx.x < 128)\n__syncthreads();\nelse\n__syncthreads();  //"),
    Defect("lanes missing from a sum", "project_rows.cu", "const double sum = gpu::warp_sum(value);",
           "double sum = value; if (threadIdx.x % 32 < 31) sum = gpu::warp_sum(value);"),
    Defect("copies of the last row counted", "project_rows.cu", "return first_row + row < problem.rows;",
           "return true;"),
    Defect("read past the last row", "project_rows.cu", "min(first_row + row, problem.rows - 1)",
           "(first_row + row)", "emulate_sanitized"),
    Defect("read past the last row of Q", "project_rows.cu", "min(d0 + step, problem.d - 1)", "(d0 + step)",
           "emulate_sanitized"),
    Defect("write past the last column", "project_rows.cu", "&& column_of_d < problem.d", "", "emulate_sanitized"),
    Defect("read past a row's end", "device.cuh", "if (i + j < n)", "", "emulate_sanitized"),
    Defect("vector read past a row's end", "device.cuh", "if (i < n) four", "four", "emulate_sanitized"),
    Defect("vector access to unaligned rows", "device.cuh", "reinterpret_cast<uintptr_t>(pointer) % 16 == 0",
           "true", "emulate_sanitized"),
    Defect("shared array one chunk short", "project_rows.cu", "arena.take<T>(static_cast<size_t>(kRows) * pitch)",
           "arena.take<T>(static_cast<size_t>(kRows - 1) * pitch)"),
    Defect("panels of Q skipped", "project_rows.cu", "column += kPanel<T>", "column += 2 * kPanel<T>"),
    Defect("problems mixed up", "project_rows.cu", "first_block <= block", "first_block < block"),
    Defect("scale forgotten", "project_rows.cu", "problem.scale * value;", "value;"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of csrc and a build of it; tests mutate one file at a time, so each rebuilds little."""
    root = tmp_path_factory.mktemp("defects")
    shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", root)
    _run("cmake", "-S", root, "-B", root / "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1")
    return root


def _run(*command):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


def _program_fails(tree, build):
    name = f"check_project_rows_{build}"
    _run("cmake", "--build", tree / "build", "--target", name)
    done = subprocess.run([tree / "build" / name], capture_output=True, text=True, timeout=120)
    return done.returncode != 0, done.stdout + done.stderr


@pytest.mark.parametrize("build", ["emulate", "emulate_sanitized"])
def test_real_sources_pass(tree, build):
    failed, output = _program_fails(tree, build)
    assert not failed, output


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name.replace(" ", "_"))
def test_defect_is_caught(tree, defect):
    path = tree / "csrc" / "kernels" / defect.file
    original = path.read_text()
    assert defect.find in original, f"{defect.file} no longer contains {defect.find!r}: update the defect"
    path.write_text(original.replace(defect.find, defect.put))
    try:
        failed, output = _program_fails(tree, defect.build)
    finally:
        path.write_text(original)
    print(defect.name, "|", defect.build, "|", output.strip().splitlines()[:3])
    assert failed, f"not caught: {defect.name}"
