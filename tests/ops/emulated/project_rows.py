import torch
from ops.emulated import REAL, integers, pointer, pointers, run


def call(library, g, q, scale, passes):
    real = REAL[g[0].dtype]
    g, q = [m.contiguous() for m in g], [m.contiguous() for m in q]
    out = [torch.full_like(m, float("nan")) for m in g]
    leak = torch.full((len(g),), float("nan"), dtype=g[0].dtype)
    shapes = integers(size for a, b in zip(g, q, strict=True) for size in (*a.shape, b.shape[1]))
    name = f"emulate_project_rows_{'float' if g[0].dtype == torch.float32 else 'double'}"
    arrays = map(pointers, (g, q, out))
    run(library, name, len(g), *arrays, shapes, (real * len(g))(*scale), passes, pointer(leak))
    return out, leak
