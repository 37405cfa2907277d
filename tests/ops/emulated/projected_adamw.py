import ctypes

import torch
from ops.emulated import FORMATS, REAL, integers, pointer, pointers, run


def call(library, a, grad, exp_avg, exp_avg_sq, q, *, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    real = REAL[a[0].dtype]
    grad, q = [m.contiguous() for m in grad], [m.contiguous() for m in q]
    leak = torch.full((len(a),), float("nan"), dtype=a[0].dtype)
    shapes = integers(size for p, b in zip(a, q, strict=True) for size in (*p.shape, b.shape[1]))
    steps = [torch.tensor(float(step))] * len(a) if isinstance(step, int) else step
    rates = [lr] * len(a) if isinstance(lr, float) else lr
    run(
        library,
        f"emulate_projected_adamw_{'float' if a[0].dtype == torch.float32 else 'double'}",
        len(a), pointers(a), pointers(exp_avg), pointers(exp_avg_sq), pointers(grad),
        integers(FORMATS[g.dtype] for g in grad), pointers(q), shapes, (real * len(a))(*rates),
        pointers(steps), (ctypes.c_double * 4)(*betas, eps, weight_decay), pointer(leak),
    )  # fmt: skip
    return leak
