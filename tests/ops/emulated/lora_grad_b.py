import torch
from ops.emulated import FORMATS, REAL, integers, pointer, pointers, run

from keeplora.ops.check import wide


def call(library, x, dy, a, *, rows, scale):
    scale = [scale] * len(a) if isinstance(scale, int | float) else scale
    x, dy = (m if m.stride(1) == 1 else m.contiguous() for m in (x, dy))
    a = [m.contiguous() for m in a]
    acc = wide(x.dtype, dy.dtype, *(m.dtype for m in a))
    t = torch.full((len(x), sum(map(len, a))), float("nan"), dtype=acc)
    db = [torch.full((stop - start, len(m)), float("nan"), dtype=acc) for (start, stop), m in zip(rows, a, strict=True)]
    sizes = integers((*x.shape, x.stride(0), dy.stride(0)))
    formats = integers(FORMATS[m.dtype] for m in (x, dy, a[0]))
    ranges = integers(number for (start, stop), m in zip(rows, a, strict=True) for number in (len(m), start, stop))
    name = f"emulate_lora_grad_b_{'float' if acc == torch.float32 else 'double'}"
    run(
        library, name, pointer(x), pointer(dy), pointer(t), sizes, formats, len(a), pointers(a), pointers(db), ranges,
        (REAL[acc] * len(a))(*scale),
    )  # fmt: skip
    return t, db
