import torch
from ops.emulated import FORMATS, REAL, integers, pointer, pointers, run

from keeplora.ops.check import wide


def call(library, dy, t, *, columns, rows, scale):
    scale = [scale] * len(rows) if isinstance(scale, int | float) else scale
    dy, t = (m if m.stride(1) == 1 else m.contiguous() for m in (dy, t))
    acc = wide(dy.dtype, t.dtype)
    places = [(*own, *mine) for own, mine in zip(columns, rows, strict=True)]
    db = [torch.full((e - s, q - p), float("nan"), dtype=acc) for p, q, s, e in places]
    sizes, formats = integers((len(dy), dy.stride(0), t.stride(0))), integers(FORMATS[m.dtype] for m in (dy, t))
    numbers = integers(number for place in places for number in place)
    name = f"emulate_lora_grad_b_{'float' if acc == torch.float32 else 'double'}"
    scales = (REAL[acc] * len(db))(*scale)
    run(library, name, pointer(dy), pointer(t), sizes, formats, len(db), pointers(db), numbers, scales)
    return db
