"""The emulated kernels (tests/csrc/emulate) as a backend of the op tests: built by CMake, loaded through ctypes."""

import ctypes
import fcntl
import functools
import importlib
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from keeplora.ops.compiled import build_info, limit_cpu_level

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "kernels"
ORDERS = {"sequential": 0, "reversed": 1, "random": 2}


class EmulatedKernels:
    """Runs csrc/kernels on the CPU, called the way csrc/bind/cuda calls them on a GPU."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.emulate_last_error.restype = ctypes.c_char_p

    def set_schedule(self, order, seed=0):
        self.library.emulate_set_schedule(ORDERS[order], ctypes.c_uint64(seed))

    def __getattr__(self, op):
        """The function ``call`` of tests/ops/emulated/<op>.py, with the library as its first argument."""
        try:
            return functools.partial(importlib.import_module(f"ops.emulated.{op}").call, self.library)
        except ModuleNotFoundError as error:
            raise AttributeError(f"no wrapper for the emulated op {op}: tests/ops/emulated/{op}.py") from error


@pytest.fixture(scope="session")
def emulated():
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes may run side by side
        for command in (
            ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja"],
            ["cmake", "--build", BUILD, "-t", "emulate"],
        ):
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    kernels = EmulatedKernels(BUILD / "libemulate.so")
    yield kernels
    kernels.set_schedule("sequential")


def has_cpu_kernel(op):
    """Whether ``op`` has a compiled kernel here: it must, unless nothing was to be compiled (KEEPLORA_CPU=0)."""
    facts = build_info()
    return op in facts["cpu_kernels"] or bool(facts["without_cpu"])


def cpu_levels():
    """The levels of vector instructions (csrc/bind/cpu/levels.h) that this CPU has; without kernels, 0 alone."""
    most = limit_cpu_level(99)
    return range(most + 1)


@contextmanager
def at_level(level):
    """The CPU's kernels use the instructions of this level."""
    assert limit_cpu_level(level) == level
    try:
        yield
    finally:
        limit_cpu_level(99)


@pytest.fixture(params=cpu_levels(), ids="level {}".format)
def every_level(request):
    with at_level(request.param):
        yield


@pytest.fixture
def random_basis():
    """A function (d, k, dtype) -> orthonormal columns, made in float64 and rounded once."""

    def make(d, k, dtype=torch.float32):
        return torch.linalg.qr(torch.randn(d, max(k, 1), dtype=torch.float64)).Q[:, :k].to(dtype).contiguous()

    return make
