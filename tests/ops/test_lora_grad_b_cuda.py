"""What only a GPU can show of this op: large problems. Streams and graphs of all ops are in test_every_op.py."""

import pytest
import torch

from keeplora.ops import lora_grad_b

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; bench/gpu.sh runs it on one")


def layer(tokens, width, ranges, ranks, dtype):
    """x, dy and the adapters' A."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    outputs = max(stop for _, stop in ranges)
    return draw(tokens, width).to(dtype), draw(tokens, outputs).to(dtype), [draw(r, width) for r in ranks]


QKV = [(0, 768), (768, 1536), (1536, 2304)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("tokens", "width", "ranges", "ranks"),
    [
        (12608, 768, QKV, [16, 16, 16]),
        (4096, 16384, [(0, 4096)], [64]),
        (1000, 257, [(3, 100), (50, 101)], [3, 33]),
        (300, 100, [(i, i + 7) for i in range(200)], [1 + i % 3 for i in range(200)]),
    ],
    ids=["qkv", "d 16384", "odd", "200 adapters"],
)
def test_large_layers(tokens, width, ranges, ranks, dtype):
    x, dy, a = layer(tokens, width, ranges, ranks, dtype)
    t, db = lora_grad_b(x, dy, a, rows=ranges, scale=0.5)
    exact_t = x.double() @ torch.cat(a).double().T
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert (t.double() - exact_t).abs().max() <= (width**0.5 + 3) * eps * exact_t.abs().max()
    for result, (start, stop), part in zip(db, ranges, exact_t.split(ranks, 1), strict=True):
        exact = 0.5 * dy[:, start:stop].double().T @ part
        # A small sum of large products is compared with what such sums are like.
        size = max(exact.abs().max(), 0.5 * dy.double().square().mean().sqrt() * part.norm())
        assert (result.double() - exact).abs().max() <= ((tokens + width) ** 0.5 + 3) * eps * size
    again_t, again = lora_grad_b(x, dy, a, rows=ranges, scale=0.5)
    assert all(torch.equal(m, n) for m, n in zip((t, *db), (again_t, *again), strict=True))
