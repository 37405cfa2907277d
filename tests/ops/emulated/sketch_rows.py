import ctypes

import torch
from ops.emulated import FORMATS, integers, pointer, run


def call(library, x, delta, *, width, seed, out=None):
    x, delta = x.contiguous(), delta.contiguous()
    double = torch.float64 in (x.dtype, delta.dtype)
    if out is None:
        out = torch.zeros(width, x.shape[1], dtype=torch.float64 if double else torch.float32)
    inputs = (pointer(x), FORMATS[x.dtype], pointer(delta), FORMATS[delta.dtype])
    shape = integers((*x.shape, delta.shape[1], width))
    run(library, "emulate_sketch_rows", *inputs, pointer(out), shape, ctypes.c_int64(seed))
    return out
