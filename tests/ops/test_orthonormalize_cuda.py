"""What only a GPU can show of this op: large problems. Streams and graphs of all ops are in test_every_op.py."""

import pytest
import torch

from keeplora.ops import orthonormalize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; bench/gpu.sh runs it on one")


def group(shapes, condition=1.0):
    """Columns whose lengths fall to 1 / condition, mixed; and bases."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64)

    def columns(d, width):
        falling = torch.logspace(0, -torch.tensor(float(condition)).log10().item(), width, device="cuda")
        return (draw(d, width) * falling @ torch.linalg.qr(draw(width, width)).Q).float()

    # Made in float64 and rounded once: a float32 QR is itself off by more than what is tested here.
    bases = [torch.linalg.qr(draw(d, max(k, 1))).Q[:, :k].float() for d, _, k in shapes]
    return [columns(d, width) for d, width, _ in shapes], bases


def check(z, rank, y, q):
    for kept, r, columns, basis in zip(z, rank.tolist(), y, q, strict=True):
        wide, both = columns.double(), torch.cat([basis, kept[:, :r]], 1).double()
        gram = both.T @ kept[:, :r].double()
        gram.diagonal(-basis.shape[1]).sub_(1)
        assert gram.abs().max() <= 5e-6
        assert not kept[:, r:].any()
        left = wide - both @ (both.T @ wide)
        left -= both @ (both.T @ left)
        allowed = (32 + 2 * len(wide) ** 0.5) * torch.finfo(torch.float32).eps
        assert (left.norm(dim=0) <= allowed * wide.norm(dim=0)).all()


@pytest.mark.parametrize(
    ("shapes", "condition"),
    [
        ([(16384, 192, 500)], 1),
        ([(16384, 192, 500)], 1e6),
        ([(257, 16, 100)] * 1000, 1e4),
        ([(768, 32, 600)] * 96, 1e7),
        ([(4096, 3, 4095)], 1),
    ],
    ids=["d 16384", "d 16384, condition 1e6", "1000 problems", "CLIP", "one free direction"],
)
def test_large_groups(shapes, condition):
    y, q = group(shapes, condition)
    z, rank = orthonormalize(y, q)
    if condition <= 1e6:
        assert rank.tolist() == [min(width, d - k) for d, width, k in shapes]
    check(z, rank, y, q)
    again = orthonormalize(y, q)
    assert all(torch.equal(a, b) for a, b in zip(z, again[0], strict=True))
    assert torch.equal(rank, again[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_low_rank(dtype):
    y = [torch.randn(2048, 20, device="cuda", dtype=dtype) @ torch.randn(20, 128, device="cuda", dtype=dtype)] * 64
    _, rank = orthonormalize(y)
    assert rank.tolist() == [20] * 64
