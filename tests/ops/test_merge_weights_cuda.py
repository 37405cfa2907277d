"""What only a GPU can show: streams, CUDA graphs, large problems, no waiting for the device."""

import pytest
import torch

from keeplora.ops import merge_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; bench/gpu.sh runs it on one")

MIXED = [(768, 768, 16, torch.float32), (100, 257, 3, torch.bfloat16), (64, 512, 0, torch.float16)]


def group(shapes, seed=0):
    """out, in, r and the dtype of W of each problem."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    w = [draw(o, n).to(dtype) for o, n, _, dtype in shapes]
    return w, [draw(r, n) for _, n, r, _ in shapes], [draw(o, r) for o, _, r, _ in shapes]


@pytest.mark.parametrize(
    ("shapes", "out"),
    [
        ([(16384, 16384, 64, torch.bfloat16)], None),
        ([(4096, 16384, 64, torch.float32)], torch.bfloat16),
        ([(257, 100, 3, torch.float32)] * 1000, None),
        ([(768, 768, 16, torch.float32)] * 96, torch.float16),
        ([(300, 500, 16, torch.float64)] * 3, None),
    ],
    ids=["d 16384", "to bfloat16", "1000 problems", "CLIP", "float64"],
)
def test_large_groups(shapes, out):
    w, a, b = group(shapes)
    merged = merge_weights(w, a, b, scale=0.1, dtype=out)
    for result, weight, down, up in zip(merged, w, a, b, strict=True):
        exact = weight.double().addmm_(up.double(), down.double(), alpha=0.1)
        acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
        allowed = torch.finfo(result.dtype).eps / 2 + (len(down) ** 0.5 + 2) * torch.finfo(acc).eps
        assert (result.double() - exact).abs().max() <= allowed * exact.abs().max()
    again = merge_weights(w, a, b, scale=0.1, dtype=out)
    assert all(torch.equal(x, y) for x, y in zip(merged, again, strict=True))


def test_follows_the_current_stream_and_does_not_wait():
    w, a, b = group(MIXED)
    expected = merge_weights(w, a, b, scale=0.5)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.default_stream())
            merged = merge_weights(w, a, b, scale=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(merged, expected, strict=True))


def test_replays_in_a_cuda_graph():
    w, a, b = group(MIXED)
    merge_weights(w, a, b, scale=0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged = merge_weights(w, a, b, scale=0.5)
    for old, new in zip((*w, *a, *b), (m for matrices in group(MIXED, seed=1) for m in matrices), strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    expected = merge_weights(w, a, b, scale=0.5)
    assert all(torch.equal(x, y) for x, y in zip(merged, expected, strict=True))


def test_second_device_of_a_list_is_refused():
    w, a, b = group(MIXED[:1])
    with pytest.raises(RuntimeError, match=r"merge_weights: a must be on GPU 0"):
        torch.ops.keeplora.merge_weights(w, [a[0].cpu()], b, [1.0], None)
