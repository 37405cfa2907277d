import pytest
import torch
from close import assert_rounded

from keeplora.ops import merge_weights

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def exact_merge(w, a, b, scale):
    return w.detach().cpu().double() + scale * torch.einsum("or,ri->oi", b.cpu().double(), a.cpu().double())


@pytest.mark.parametrize("out", FLOATS, ids=str)
@pytest.mark.parametrize("inner", FLOATS, ids=str)
def test_matches_float64(device, inner, out):
    shapes = [(5, 7, 2), (33, 31, 16), (1, 1, 1), (8, 9, 0), (0, 4, 2)]  # out, in, r
    w = [torch.randn(o, i, device=device).to(inner) for o, i, _ in shapes]
    a = [torch.randn(r, i, device=device) for _, i, r in shapes]
    b = [torch.randn(o, r, device=device) for o, _, r in shapes]
    scale = [0.5, 1.0, -2.0, 1.0, 1.0]
    merged = merge_weights(w, a, b, scale=scale, dtype=out)
    for i, (o, n, r) in enumerate(shapes):
        assert (merged[i].dtype, merged[i].shape) == (out, (o, n))
        exact = exact_merge(w[i], a[i], b[i], scale[i])
        single = out == torch.float64 and inner != torch.float64  # sums were formed in float32
        assert_rounded(merged[i].float() if single else merged[i], exact, terms=r + 1, what=f"merged[{i}]")


def test_rounds_once_per_element(device):
    """Within one unit in the last place of bfloat16 everywhere, small entries beside large ones too."""
    w = torch.randn(64, 48, device=device) * torch.logspace(-6, 3, 48, device=device)
    a, b = torch.zeros(4, 48, device=device), torch.randn(64, 4, device=device)
    merged = merge_weights([w], [a], [b], scale=1.0, dtype=torch.bfloat16)[0]
    assert torch.equal(merged, w.bfloat16())


def test_row_range_of_a_fused_weight(device):
    fused = torch.randn(12, 6, device=device)
    a, b = torch.randn(2, 6, device=device), torch.randn(4, 2, device=device)
    merged = merge_weights([fused[4:8]], [a], [b], scale=0.5)[0]
    assert_rounded(merged, exact_merge(fused[4:8], a, b, 0.5), terms=3, what="rows 4 to 8")
    transposed = merge_weights([fused.t()], [b.t()[:, :4].repeat(1, 3)], [torch.randn(6, 2, device=device)], scale=0)
    assert torch.equal(transposed[0], fused.t())


def test_gradient(device):
    def make(*shape):
        return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

    w, a, b = [make(3, 4), make(2, 2)], [make(2, 4), make(1, 2)], [make(3, 2), make(2, 1)]

    def merge(*flat):
        return tuple(merge_weights(flat[:2], flat[2:4], flat[4:], scale=[0.5, -1.5]))

    assert torch.autograd.gradcheck(merge, (*w, *a, *b))


def test_gradient_of_b_alone(device):
    """The usual case: weight and A are frozen."""
    w, a = torch.randn(3, 4, device=device), torch.randn(2, 4, device=device)
    b = torch.randn(3, 2, device=device, requires_grad=True)
    weight = torch.randn(3, 4, device=device)
    (merge_weights([w], [a], [b], scale=0.5)[0] * weight).sum().backward()
    assert_rounded(b.grad, 0.5 * weight.cpu().double() @ a.cpu().double().T, terms=4, what="b.grad")


def test_result_is_new_memory(device):
    w = torch.randn(3, 4, device=device)
    merged = merge_weights([w], [torch.zeros(0, 4, device=device)], [torch.zeros(3, 0, device=device)], scale=1.0)[0]
    assert merged.data_ptr() != w.data_ptr()
    assert torch.equal(merged, w)


def test_compiles_in_one_graph(device):
    w, a, b = (torch.randn(s, device=device) for s in ((3, 4), (2, 4), (3, 2)))
    compiled = torch.compile(lambda b: merge_weights([w], [a], [b], scale=2.0), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(b), merge_weights([w], [a], [b], scale=2.0))


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (((3, 4), (2, 4), (3, 1)), {}, ValueError, r"b\[0\] times a\[0\] must have the shape of w\[0\]"),
        (((3, 4), (2, 5), (3, 2)), {}, ValueError, r"got \[3, 2\] times \[2, 5\] for \[3, 4\]"),
        (((3, 4), (2, 4), (3, 2)), {"dtype": torch.int8}, TypeError, r"dtype must be a floating dtype, got torch.int8"),
        (((3, 4), (2, 4), (3, 2)), {"scale": float("inf")}, ValueError, r"scale must be finite, got inf"),
    ],
)
def test_refuses(shapes, options, error, message):
    w, a, b = ([torch.zeros(shape)] for shape in shapes)
    with pytest.raises(error, match=message):
        merge_weights(w, a, b, **{"scale": 1.0} | options)
