import torch
from ops.emulated import integers, pointer, pointers, run


def call(library, y, q=None):
    y = [m.contiguous() for m in y]
    q = [m.new_empty(m.shape[0], 0) for m in y] if q is None else [m.contiguous() for m in q]
    z = [torch.full_like(m, float("nan")) for m in y]
    rank = torch.full((len(y),), -1, dtype=torch.int64)
    shapes = integers(size for a, b in zip(y, q, strict=True) for size in (*a.shape, b.shape[1]))
    name = f"emulate_orthonormalize_{'float' if y[0].dtype == torch.float32 else 'double'}"
    run(library, name, len(y), *map(pointers, (y, q, z)), shapes, pointer(rank))
    return z, rank
