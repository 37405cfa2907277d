import torch
from ops.emulated import FORMATS, REAL, integers, pointers, run

from keeplora.ops.check import wide


def call(library, w, a, b, *, scale, places=None, origin=None, dtype=None, stack=False):
    """The problems that csrc/bind/cuda/merge_weights.cpp makes of the op's arguments."""
    scale = [scale] * len(a) if isinstance(scale, int | float) else scale
    places = [(k, 0, len(m)) for k, m in enumerate(w)] if places is None else places
    origin = [None] * len(a) if origin is None else origin
    w = [m if m.stride(1) == 1 else m.contiguous() for m in w]
    a, b, origin = ([None if m is None else m.contiguous() for m in group] for group in (a, b, origin))
    out = [torch.full(m.shape, float("nan"), dtype=dtype or m.dtype) for m in w]
    problems = []  # the dtype of the sums, W, A, B, B0, result, scale
    stacked = []
    for k, (weight, merged) in enumerate(zip(w, out, strict=True)):
        mine = [j for j, place in enumerate(places) if place[0] == k]
        acc = wide(weight.dtype, *(m.dtype for j in mine for m in (a[j], b[j], origin[j]) if m is not None))
        row = 0
        for start, stop, j in sorted((places[j][1], places[j][2], j) for j in mine if places[j][1] < places[j][2]):
            problems.append((acc, weight[row:start], None, None, None, merged[row:start], 0.0))
            problems.append((acc, weight[start:stop], a[j], b[j], origin[j], merged[start:stop], scale[j]))
            row = stop
        problems.append((acc, weight[row:], None, None, None, merged[row:], 0.0))
        if stack:
            downs = [a[j] for j in mine]
            stacked.append(torch.full((sum(map(len, downs)), weight.shape[1]), float("nan"), dtype=merged.dtype))
            for down, to in zip(downs, stacked[-1].split([len(m) for m in downs]) if downs else [], strict=True):
                problems.append((wide(down.dtype), down, None, None, None, to, 0.0))
    for acc, name in ((torch.float32, "float"), (torch.float64, "double")):
        some = [problem[1:] for problem in problems if problem[0] == acc and len(problem[1])]
        w_, a_, b_, origin_, out_, scale_ = map(list, zip(*some, strict=True)) if some else ([],) * 6
        matrices = (w_, a_, b_, origin_, out_)
        arrays = (pointers([torch.empty(0) if m is None else m for m in group]) for group in matrices)
        ranks = [0 if down is None else len(down) for down in a_]
        shapes = integers(n for m, r in zip(w_, ranks, strict=True) for n in (*m.shape, r, m.stride(0)))
        formats = integers(0 if m is None else FORMATS[m.dtype] for own in zip(*matrices, strict=True) for m in own)
        run(
            library,
            f"emulate_merge_weights_{name}",
            len(some),
            *arrays,
            shapes,
            formats,
            (REAL[acc] * len(some))(*scale_),
        )
    return (out, stacked) if stack else out
