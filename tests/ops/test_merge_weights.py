import pytest
import torch
from close import assert_rounded

from keeplora.ops import build_info, merge_weights

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["op", "emulated kernel"] + (["CUDA kernel"] if torch.cuda.is_available() else [])


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The op as users call it, the CUDA kernel's source run on the CPU and, where there is one, a GPU; its device."""
    if request.param == "emulated kernel":
        return request.getfixturevalue("emulated").merge_weights, "cpu"
    if request.param == "CUDA kernel":
        assert "merge_weights" in build_info()["kernels"]
        return merge_weights, "cuda"
    return merge_weights, "cpu"


def exact_merge(w, a, b, scale):
    return w.detach().cpu().double() + scale * torch.einsum("or,ri->oi", b.cpu().double(), a.cpu().double())


def problems(shapes, device, dtypes=(torch.float32,)):
    """w, a, b, scale of these (out, in, r); the i-th problem's matrices take their dtypes in turn."""

    def draw(i, *shape):
        return torch.randn(shape, device=device).to(dtypes[i % len(dtypes)])

    w = [draw(i, o, n) for i, (o, n, _) in enumerate(shapes)]
    a = [draw(i // 2, r, n) for i, (_, n, r) in enumerate(shapes)]
    b = [draw(i // 3, o, r) for i, (o, _, r) in enumerate(shapes)]
    return w, a, b, torch.linspace(-2, 1.5, len(shapes)).tolist()


def check(merged, w, a, b, scale, dtype):
    for i, (weight, down, up) in enumerate(zip(w, a, b, strict=True)):
        out = dtype or weight.dtype
        assert (merged[i].dtype, merged[i].shape, merged[i].device) == (out, weight.shape, weight.device)
        exact = exact_merge(weight, down, up, scale[i])
        single = out == torch.float64 and torch.float64 not in (weight.dtype, down.dtype, up.dtype)
        size = max(exact.abs().max(), weight.abs().max().cpu()) if weight.numel() else None
        result = merged[i].float() if single else merged[i]  # sums were formed in float32
        assert_rounded(result, exact, terms=len(down) + 1, what=f"merged[{i}]", size=size)


# out, in, r: one element, odd sizes, no rank, nothing, several tiles in each direction, more ranks than a step of
# the product sums, and than it holds at a time.
SHAPES = [
    (5, 7, 2),
    (33, 31, 16),
    (1, 1, 1),
    (8, 9, 0),
    (0, 4, 2),
    (6, 0, 3),
    (130, 200, 16),
    (40, 68, 40),
    (3, 96, 130),
]


@pytest.mark.parametrize("out", FLOATS, ids=str)
@pytest.mark.parametrize("inner", FLOATS, ids=str)
def test_matches_float64(backend, inner, out):
    merge, device = backend
    w, a, b, scale = problems(SHAPES, device)
    w = [weight.to(inner) for weight in w]
    check(merge(w, a, b, scale=scale, dtype=out), w, a, b, scale, out)


@pytest.mark.parametrize("out", [None, torch.bfloat16], ids=str)
def test_every_matrix_has_a_dtype_of_its_own(backend, out):
    merge, device = backend
    w, a, b, scale = problems([(9, 36, 5), (20, 72, 3)] * 24, device, FLOATS)
    assert len({(weight.dtype, down.dtype, up.dtype) for weight, down, up in zip(w, a, b, strict=True)}) > 10
    check(merge(w, a, b, scale=scale, dtype=out), w, a, b, scale, out)


def test_rounds_once_per_element(backend):
    """Within one unit in the last place of bfloat16 everywhere, small entries beside large ones too."""
    merge, device = backend
    w = torch.randn(64, 48, device=device) * torch.logspace(-6, 3, 48, device=device)
    a, b = torch.zeros(4, 48, device=device), torch.randn(64, 4, device=device)
    merged = merge([w], [a], [b], scale=1.0, dtype=torch.bfloat16)[0]
    assert torch.equal(merged, w.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_is_off_by_one_unit_at_most(backend, dtype):
    """Every element is next to, or is, what rounding the exact sum gives."""
    merge, device = backend
    w, a, b = torch.randn(70, 80, device=device).to(dtype), torch.randn(16, 80, device=device), torch.randn(70, 16)
    b = b.to(device)
    merged = merge([w], [a], [b], scale=0.1)[0].cpu()
    exact = exact_merge(w, a, b, 0.1)
    nearest = exact.to(dtype)
    near = torch.tensor(torch.inf, dtype=dtype)
    neighbours = torch.stack([nearest, torch.nextafter(nearest, near), torch.nextafter(nearest, -near)])
    large = exact.abs() > 1e-3 * exact.abs().max()  # below that, the float sum itself is off by more
    assert ((merged == neighbours).any(0) | ~large).all()
    assert (merged == nearest).float().mean() > 0.99


def test_row_range_of_a_fused_weight(backend):
    merge, device = backend
    fused = torch.randn(12, 6, device=device)
    a, b = torch.randn(2, 6, device=device), torch.randn(4, 2, device=device)
    merged = merge([fused[4:8]], [a], [b], scale=0.5)[0]
    assert_rounded(merged, exact_merge(fused[4:8], a, b, 0.5), terms=3, what="rows 4 to 8")
    transposed = merge([fused.t()], [b.t()[:, :4].repeat(1, 3)], [torch.randn(6, 2, device=device)], scale=0)
    assert torch.equal(transposed[0], fused.t())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_and_unaligned_inputs(backend, dtype):
    merge, device = backend
    wide = torch.randn(20, 161, device=device).to(dtype)
    a, b = torch.randn(3, 64, device=device), torch.randn(20, 3, device=device)
    for weight in (wide[:, 16:80], wide[:, 1:65], wide[:, ::2][:, :64], wide[:, 0:1].expand(20, 64)):
        for down, up in ((a, b), (a.t().contiguous().t(), torch.cat([b.new_zeros(1), b.flatten()])[1:].view(20, 3))):
            check(merge([weight], [down], [up], scale=[0.5]), [weight], [down], [up], [0.5], None)


def test_a_thousand_problems(backend):
    merge, device = backend
    w, a, b, scale = problems([(1 + i % 3, 5 + i % 4, i % 4) for i in range(1000)], device)
    check(merge(w, a, b, scale=scale), w, a, b, scale, None)


def test_no_problems():
    assert merge_weights([], [], [], scale=1.0) == []


def test_dependent_ranks_cancel(backend):
    """B A = 0 from terms that are not: what is left is W up to the rounding of the terms."""
    merge, device = backend
    w, a, b = torch.randn(30, 40, device=device), torch.randn(4, 40, device=device), torch.randn(30, 4, device=device)
    merged = merge([w], [torch.cat([a, a])], [torch.cat([b, -b], 1)], scale=1.0)[0]
    assert_rounded(merged, w.cpu().double(), terms=9, what="merged", size=(b.abs() @ a.abs()).max().cpu())


def test_not_finite_stays_where_it_is(backend):
    merge, device = backend
    w, a, b = torch.randn(70, 80, device=device), torch.randn(2, 80, device=device), torch.randn(70, 2, device=device)
    w[3, 4], w[66, 70] = torch.nan, torch.inf
    finite = merge([w], [a], [b], scale=1.0)[0].isfinite()
    assert torch.equal(finite, w.isfinite())


def test_kernel_gives_the_same_bits_in_any_order(emulated):
    w, a, b, scale = problems([(70, 66, 40), (9, 36, 5), (3, 130, 1)], "cpu", FLOATS[1:])
    results = []
    for order, seed in (("sequential", 0), ("reversed", 0), ("random", 1), ("random", 2)):
        emulated.set_schedule(order, seed)
        results.append(emulated.merge_weights(w, a, b, scale=scale))
    emulated.set_schedule("sequential")
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


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


def test_result_is_new_memory(backend):
    merge, device = backend
    w = torch.randn(3, 4, device=device)
    merged = merge([w], [torch.zeros(0, 4, device=device)], [torch.zeros(3, 0, device=device)], scale=1.0)[0]
    assert merged.data_ptr() != w.data_ptr()
    assert torch.equal(merged, w)


def test_compiles_in_one_graph(device):
    w, a, b = (torch.randn(s, device=device) for s in ((3, 4), (2, 4), (3, 2)))
    compiled = torch.compile(lambda b: merge_weights([w], [a], [b], scale=2.0), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(b), merge_weights([w], [a], [b], scale=2.0))


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (
            ((3, 4), (2, 4), (3, 1)),
            {},
            ValueError,
            r": b\[0\] .*a\[0\] must .*w\[0\], got \[3, 1\] .*\[2, 4\] for \[3, 4\]",
        ),
        (
            ((3, 4), (2, 5), (3, 2)),
            {},
            ValueError,
            r": b\[0\] .*a\[0\] must .*w\[0\], got \[3, 2\] .*\[2, 5\] for \[3, 4\]",
        ),
        (((3, 4), (2, 4), (3, 2)), {"dtype": torch.int8}, TypeError, r": dtype must .* got torch.int8"),
        (((3, 4), (2, 4), (3, 2)), {"scale": float("inf")}, ValueError, r": scale must .* got inf"),
    ],
)
def test_refuses(shapes, options, error, message):
    w, a, b = ([torch.zeros(shape)] for shape in shapes)
    with pytest.raises(error, match="^merge_weights" + message):
        merge_weights(w, a, b, **{"scale": 1.0} | options)
