"""What the kernels ask for, against what is written down: a kernel that starts to ask for more is noticed."""

import json
import subprocess

import pytest
from csrc.programs import find_nvcc

from csrc import counted

MORE = 1.02
NUMBERS = ("requests", "read_sectors", "written_sectors", "wavefronts")


def stored():
    return json.loads(counted.STORED.read_text())


def worse(found, known):
    """What grew, as sentences."""
    for kernel, cases in known.items():
        for name, case in cases.items():
            now = found[kernel][name]
            grown = {key: (case[key], now[key]) for key in NUMBERS if now[key] > MORE * case[key]}
            was, products = (sum(c["products"].values()) for c in (case, now))
            grown |= {"products": (was, products)} if products > MORE * was else {}
            for key, (before, after) in grown.items():
                yield f"{kernel} {name}: {key} {before} -> {after}"


def test_every_kernel_is_counted_and_every_benchmark_has_its_case():
    known = stored()
    assert known["kernels"].keys() == known["instructions"].keys() == {path.stem for path in counted.KERNELS}
    assert all(name in known["kernels"][kernel] for _, kernel, name, *_ in counted.BENCHMARKS)
    assert set(counted.product_names().values()) == set(counted.OPERATIONS)


def test_the_page_has_the_tables_of_what_is_written_down():
    text = counted.PAGE.read_text()
    assert text[text.index(counted.BEGIN) + len(counted.BEGIN) : text.index(counted.END)].strip() == counted.table(
        stored()
    )


def test_growth_is_told_by_name():
    known = {"k": {"c": {**dict.fromkeys(NUMBERS, 100), "products": {"mma_tf32": 50}}}}
    more = {"k": {"c": {**dict.fromkeys(NUMBERS, 102), "products": {"mma_tf32": 60}}}}
    assert list(worse(more, known)) == ["k c: products 50 -> 60"]
    assert not list(worse(known, more))


def test_bounds_are_the_formulas_of_the_page():
    case = {"compulsory": 100.0, "read_sectors": 3, "written_sectors": 2, "products": {"mma_tf32": 7}}
    gpu = {"memory": 50.0, "L2": 16.0, "multiprocessors": 2, "clock": 10.0, "mma_tf32": 2048.0}
    assert counted.seconds(case, 4.0, 2, 3, gpu) == {
        "memory": 6.0, "L2": 20.0, "tensor cores": 14.0, "issue": pytest.approx(0.7),
    }  # fmt: skip


def test_inner_loops_are_read_from_machine_code():
    """Nested loops count once, loops without tensor instructions not at all."""
    lines = ["Function : one"]
    names = ["MOV", "LDS", "HMMA.1688.F32.TF32", "IADD3", "HMMA.1688.F32.TF32", "BRA 0x0010", "MOV", "BRA 0x0000"]
    lines += [f"        /*{16 * i:04x}*/                   {name} ;" for i, name in enumerate(names)]
    lines += [
        "Function : two",
        "        /*0000*/                   MOV R1 ;",
        "        /*0010*/        @P0 BRA 0x0000 ;",
    ]
    assert counted.loops("\n".join(lines)) == [(5, {"HMMA.1688.F32.TF32": 2})]


KERNEL = r"""
#include "kernels/launch.h"
#include "kernels/primitives/async.cuh"
#include "kernels/primitives/shared.cuh"
namespace {
__global__ void copies(const float* from, float* to, int stride) {
  gpu::SharedArena arena;
  float* shared = arena.take<float>(1024);
  shared[threadIdx.x * stride] = from[threadIdx.x];
  gpu::copy_async<16>(shared + 512 + 4 * threadIdx.x, from + 4 * threadIdx.x);
  gpu::copy_commit();
  gpu::copy_wait<0>();
  __syncthreads();
  to[threadIdx.x * stride] = shared[threadIdx.x * stride];
}
}
int run(const float* from, float* to, int stride) {
  return gpu::launch(copies, {.grid = 1, .block = 64, .shared_bytes = 8192}, from, to, stride);
}
"""
PROGRAM = r"""
#include <cstdio>
#include <vector>
#include "counting/hooks.h"
int run(const float*, float*, int);
int main() {
  std::vector<float> memory(8192 + 64);
  float* from = memory.data();
  while (reinterpret_cast<uintptr_t>(from) % 128) ++from;
  for (int stride : {1, 8}) {
    counting::begin(memory.data(), memory.size() * 4);
    if (run(from, from + 2048, stride)) return 1;
    const counting::Counts c = counting::end();
    std::printf("%lu %lu %lu %lu %lu %lu\n", c.requests, c.read_sectors, c.written_sectors, c.ideal_sectors,
                c.wavefronts, c.ideal_wavefronts);
  }
}
"""


def test_a_kernel_of_known_accesses_is_counted_right(tmp_path):
    """Two warps. Each reads 128 bytes, copies 512, writes 128: side by side, or each number in a sector of its own."""
    (tmp_path / "kernel.cu").write_text(KERNEL)
    (tmp_path / "program.cpp").write_text(PROGRAM)
    program = counted.built(tmp_path, tmp_path / "program.cpp", [tmp_path / "kernel.cu"])
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    side_by_side, apart = ([int(number) for number in line.split()] for line in lines)
    # per warp: 3 requests; 4 + 16 sectors read, 4 written; shared: 1 written, 4 by the copy, 1 read
    assert side_by_side == [6, 40, 8, 48, 12, 12]
    # 32 sectors written, of which 4 are needed; 8 numbers in each of 4 banks, twice
    assert apart == [6, 40, 64, 48, 40, 12]


@pytest.mark.proof
def test_kernels_ask_for_no_more_than_is_written_down(tmp_path):
    grown = list(worse(counted.counted(counted.built(tmp_path)), stored()["kernels"]))
    assert not grown, "\n".join([*grown, "if that is meant: PYTHONPATH=tests python -m csrc.counted --write"])


@pytest.mark.proof
def test_inner_loops_have_no_more_instructions_than_is_written_down(tmp_path):
    release = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    if f"release {counted.NVCC}" not in release:
        pytest.skip(f"written down for nvcc {counted.NVCC}; this one schedules differently")
    found, known = counted.instructions(tmp_path), stored()["instructions"]
    assert all(low <= MORE * known[name][0] and high <= MORE * known[name][1] for name, (low, high) in found.items()), (
        found
    )
