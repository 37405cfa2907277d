"""What only a GPU can show: streams, CUDA graphs, large problems, no waiting for the device."""

import pytest
import torch

from keeplora.ops import random_signs, sketch_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; bench/gpu.sh runs it on one")


def inputs(tokens, d_in, d_out, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_follows_the_current_stream_and_does_not_wait(dtype):
    x, delta = inputs(12608, 768, 768, dtype)
    expected = sketch_rows(x, delta, width=64, seed=1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.default_stream())
            z = sketch_rows(x, delta, width=64, seed=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(z, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_in_a_cuda_graph(dtype):
    x, delta = inputs(500, 96, 200, dtype)
    z = sketch_rows(x, delta, width=20, seed=1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sketch_rows(x, delta, width=20, seed=1, out=z)
    for old, new in zip((x, delta), inputs(500, 96, 200, dtype, seed=1), strict=True):
        old.copy_(new)
    expected = sketch_rows(x, delta, width=20, seed=1, out=z.clone())
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(z, expected)
