"""What only a GPU can show of this op: large problems. Streams and graphs of all ops are in test_every_op.py."""

import pytest
import torch

from keeplora.ops import project_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; bench/gpu.sh runs it on one")


def group(shapes):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    # Made in float64 and rounded once: a float32 QR is itself off by more than what is tested here.
    bases = [torch.linalg.qr(draw(d, max(k, 1)).double()).Q[:, :k].float() for _, d, k in shapes]
    return [draw(r, d) for r, d, _ in shapes], bases


def error(rows, g, q, scale):
    """Largest error relative to the largest entry of G, against float64 on the device."""
    worst = 0.0
    for out, a, b, c in zip(rows, g, q, scale, strict=True):
        wide, basis = a.double(), b.double()
        exact = c * (wide - (wide @ basis) @ basis.T)
        worst = max(worst, ((out.double() - exact).abs().max() / (c * wide).abs().max()).item())
    return worst


@pytest.mark.parametrize(
    "shapes",
    [[(64, 16384, 512)], [(16, 257, 100)] * 1000, [(16, 768, 600)] * 96, [(3, 4096, 4095)]],
    ids=["d 16384", "1000 problems", "CLIP", "one free direction"],
)
def test_large_groups(shapes):
    g, q = group(shapes)
    scale = torch.linspace(0.2, 1, len(shapes)).tolist()
    rows, leak = project_rows(g, q, scale=scale, passes=2)
    depth = max(d + k for _, d, k in shapes)
    assert error(rows, g, q, scale) <= 2 * (depth**0.5 + 2) * torch.finfo(torch.float32).eps
    assert leak.max() <= 5e-7
    again = project_rows(g, q, scale=scale, passes=2)
    assert all(torch.equal(a, b) for a, b in zip(rows, again[0], strict=True))
    assert torch.equal(leak, again[1])
