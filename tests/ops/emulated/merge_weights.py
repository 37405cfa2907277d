import torch
from ops.emulated import FORMATS, REAL, integers, pointers, run

from keeplora.ops.check import wide


def call(library, w, a, b, *, scale, dtype=None):
    scale = [scale] * len(w) if isinstance(scale, int | float) else scale
    w = [m if m.stride(1) == 1 else m.contiguous() for m in w]
    a, b = [m.contiguous() for m in a], [m.contiguous() for m in b]
    out = [torch.full(m.shape, float("nan"), dtype=dtype or m.dtype) for m in w]
    for acc, name in ((torch.float32, "float"), (torch.float64, "double")):
        mine = [i for i in range(len(w)) if wide(w[i].dtype, a[i].dtype, b[i].dtype) == acc]
        arrays = (pointers([group[i] for i in mine]) for group in (w, a, b, out))
        shapes = integers(size for i in mine for size in (*w[i].shape, len(a[i]), w[i].stride(0)))
        formats = integers(FORMATS[group[i].dtype] for i in mine for group in (w, a, b, out))
        scales = (REAL[acc] * len(mine))(*(scale[i] for i in mine))
        run(library, f"emulate_merge_weights_{name}", len(mine), *arrays, shapes, formats, scales)
    return out
