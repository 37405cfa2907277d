"""The emulated kernels: ``call(library, ...)`` of <op>.py hands an op's arguments to tests/csrc/entries/<op>.cpp."""

import ctypes

import torch

# As in csrc/kernels/format.h.
FORMATS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
REAL = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def integers(values):
    values = list(values)
    return (ctypes.c_int64 * len(values))(*values)


def run(library, name, *arguments):
    """Calls a function of the library that returns a cudaError_t; what the emulator found wrong fails the test."""
    failed = getattr(library, name)(*arguments)
    assert not failed, library.emulate_last_error().decode() or f"{name} returned error {failed}"
