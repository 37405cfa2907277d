"""What only a GPU can show of this op: large problems, steps counted on the device.

Streams and graphs of all ops are in test_every_op.py.
"""

import pytest
import torch

from keeplora.ops import projected_adamw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; bench/gpu.sh runs it on one")

CLIP = [(16, 768, 300), (16, 512, 0), (8, 100, 100), (3, 33, 7)]


def group(shapes, dtype=torch.float32):
    q = [torch.linalg.qr(torch.randn(d, max(k, 1), device="cuda").double()).Q[:, :k].to(dtype) for _, d, k in shapes]
    a = [torch.randn(r, d, device="cuda", dtype=dtype) for r, d, _ in shapes]
    a = [m - m @ basis @ basis.T for m, basis in zip(a, q, strict=True)]
    grad = [torch.randn_like(m) for m in a]
    return a, grad, [torch.zeros_like(m) for m in a], [torch.zeros_like(m) for m in a], q


def exact_first_step(a, grad, q, lr):
    """On the device in float64; eps = 1 keeps Adam from turning rounding into steps."""
    a, grad, q = a.double(), grad.double(), q.double()

    def outside(rows):
        return rows - (rows @ q) @ q.T

    g = outside(grad)
    return outside(a * (1 - lr * 0.01) - lr * g / (g.abs() + 1))


@pytest.mark.parametrize(
    "shapes",
    [[(64, 16384, 512)], [(16, 257, 100)] * 1000, [(16, 768, 600)] * 96, [(200, 4096, 900)]],
    ids=["d 16384", "1000 problems", "CLIP", "many rows"],
)
def test_large_groups(shapes):
    a, grad, m, v, q = group(shapes)
    exact = [exact_first_step(*args, 0.1) for args in zip(a, grad, q, strict=True)]
    again = [[t.clone() for t in tensors] for tensors in (a, m, v)]
    leak = projected_adamw(a, grad, m, v, q, step=1, lr=0.1, eps=1.0)
    for actual, expected, (_, d, k) in zip(a, exact, shapes, strict=True):
        allowed = 3 * ((d + k) ** 0.5 + 2) * torch.finfo(torch.float32).eps
        assert (actual.double() - expected).abs().max() / expected.abs().max() <= allowed
    assert leak.max() <= 1e-6
    same = projected_adamw(again[0], grad, again[1], again[2], q, step=1, lr=0.1, eps=1.0)
    assert all(torch.equal(x, y) for x, y in zip(a, again[0], strict=True))
    assert torch.equal(leak, same)


def test_steps_counted_on_the_device_advance_in_a_graph():
    state = group(CLIP)
    other = [[t.clone() for t in tensors] for tensors in state]
    warm = [[t.clone() for t in tensors] for tensors in state]
    step = torch.zeros((), device="cuda")
    projected_adamw(*warm, step=step + 1, lr=0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step += 1
        projected_adamw(*state, step=step, lr=0.1)
    for count in range(1, 6):
        graph.replay()
        projected_adamw(*other, step=count, lr=0.1)
    torch.cuda.synchronize()
    assert step.item() == 5
    assert all(torch.equal(x, y) for x, y in zip(state[0], other[0], strict=True))


def test_device_steps_are_not_waited_for():
    state, step = group(CLIP), torch.ones((), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        projected_adamw(*state, step=step, lr=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradients_in_sixteen_bits():
    a, grad, m, v, q = group(CLIP)
    half = [g.bfloat16() for g in grad]
    copies = [[t.clone() for t in tensors] for tensors in (a, m, v)]
    projected_adamw(a, half, m, v, q, step=1, lr=0.1)
    projected_adamw(copies[0], [g.float() for g in half], copies[1], copies[2], q, step=1, lr=0.1)
    assert all(torch.equal(x, y) for x, y in zip(a, copies[0], strict=True))
