"""A few small calls of every CUDA kernel, for compute-sanitizer: odd, empty and unaligned problems included."""

import torch

from keeplora.ops import project_rows


def main() -> None:
    shapes = [(1, 1, 0), (3, 31, 8), (9, 33, 0), (16, 100, 47), (8, 768, 300), (5, 64, 64), (0, 16, 4)]
    for dtype in (torch.float32, torch.float64):
        g = [torch.ones(r, d, dtype=dtype, device="cuda") for r, d, _ in shapes]
        q = [torch.eye(d, dtype=dtype, device="cuda")[:, :k].contiguous() for _, d, k in shapes]
        for passes in (1, 2):
            rows, _ = project_rows(g, q, scale=0.5, passes=passes)
            torch.cuda.synchronize()
            for (_, _, k), out in zip(shapes, rows, strict=True):
                assert out[:, :k].count_nonzero() == 0
                assert bool((out[:, k:] == 0.5).all())
    print("project_rows: as expected")


if __name__ == "__main__":
    main()
