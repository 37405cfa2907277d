"""What only a GPU can show of this op: large problems. Streams and graphs of all ops are in test_every_op.py."""

import pytest
import torch

from keeplora.ops import merge_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; bench/gpu.sh runs it on one")


def group(shapes):
    """out, in, r and the dtype of W of each problem."""
    generator = torch.Generator("cuda").manual_seed(0)

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


def test_second_device_of_a_list_is_refused():
    w, a, b = group([(768, 768, 16, torch.float32)])
    with pytest.raises(RuntimeError, match=r"merge_weights: a must .*GPU 0"):
        torch.ops.keeplora.merge_weights(w, [a[0].cpu()], b, [1.0], None)
