"""What only a GPU can show of this op: large problems. Streams and graphs of all ops are in test_every_op.py."""

import pytest
import torch

from keeplora.ops import lora_grad_b

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; bench/gpu.sh runs it on one")


def layer(tokens, ranges, ranks, dtype):
    """dy and t."""
    generator = torch.Generator("cuda").manual_seed(0)
    outputs = max(stop for _, stop in ranges)
    shapes = ((tokens, outputs), (tokens, sum(ranks)))
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]


QKV = [(0, 768), (768, 1536), (1536, 2304)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("tokens", "ranges", "ranks"),
    [
        (12608, QKV, [16, 16, 16]),
        (4096, [(0, 4096)], [64]),
        (1000, [(3, 100), (50, 101)], [3, 33]),
        (300, [(i, i + 7) for i in range(200)], [1 + i % 3 for i in range(200)]),
    ],
    ids=["qkv", "d 4096", "odd", "200 adapters"],
)
def test_large_layers(tokens, ranges, ranks, dtype):
    dy, t = layer(tokens, ranges, ranks, dtype)
    ends = torch.tensor(ranks).cumsum(0).tolist()
    columns = [(end - r, end) for end, r in zip(ends, ranks, strict=True)]
    db = lora_grad_b(dy, t, columns=columns, rows=ranges, scale=0.5)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for result, (start, stop), (p, q) in zip(db, ranges, columns, strict=True):
        exact = 0.5 * dy[:, start:stop].double().T @ t[:, p:q].double()
        # A small sum of large products is compared with what such sums are like.
        size = max(exact.abs().max(), 0.5 * dy.double().square().mean().sqrt() * t[:, p:q].double().norm())
        assert (result.double() - exact).abs().max() <= (tokens**0.5 + 3) * eps * size
    again = lora_grad_b(dy, t, columns=columns, rows=ranges, scale=0.5)
    assert all(torch.equal(m, n) for m, n in zip(db, again, strict=True))
