"""What only a GPU can show of this op: large problems. Streams and graphs of all ops are in test_every_op.py."""

import pytest
import torch

from keeplora.ops import random_signs, sketch_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; bench/gpu.sh runs it on one")


def inputs(tokens, d_in, d_out, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(tokens, d, generator=generator, device="cuda").to(dtype) for d in (d_in, d_out)]


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.float16, 1e-5), (torch.bfloat16, 3e-3)],
    ids=str,
)
@pytest.mark.parametrize(
    "shape", [(8192, 4096, 4096, 256), (40000, 768, 2304, 100), (300, 16384, 16384, 64), (1000, 257, 1001, 7)], ids=str
)
def test_large_problems(shape, dtype, bound):
    tokens, d_in, d_out, width = shape
    x, delta = inputs(tokens, d_in, d_out, dtype)
    z = sketch_rows(x, delta, width=width, seed=2**50)
    psi = random_signs(width, d_out, seed=2**50, device="cuda", dtype=torch.float64) / width**0.5
    exact = psi @ delta.double().T @ x.double()
    assert (z.double() - exact).norm() <= bound * exact.norm()
    assert torch.equal(sketch_rows(x, delta, width=width, seed=2**50), z)
