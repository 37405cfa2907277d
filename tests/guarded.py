"""Memory that ends where a matrix does."""

import ctypes
import mmap

import torch


def at_the_end_of_memory(rows, columns, dtype):
    """A random matrix whose last element is the last one that may be read; a read beyond it ends the process."""
    size = rows * columns * dtype.itemsize
    pages = -(-size // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden = start + (pages - 1) * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), mmap.PAGESIZE, 0) == 0
    offset = (pages - 1) * mmap.PAGESIZE - size
    return torch.frombuffer(memory, dtype=dtype, count=rows * columns, offset=offset).view(rows, columns).normal_()
