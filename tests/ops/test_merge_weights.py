import pytest
import torch
from close import assert_rounded
from guarded import at_the_end_of_memory
from ops.conftest import at_level, cpu_levels, has_cpu_kernel

from keeplora.ops import build_info, merge_weights
from keeplora.ops.declare import OPS

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [*cpu_levels(), "emulated kernel"] + (["CUDA kernel"] if torch.cuda.is_available() else [])


@pytest.fixture(params=BACKENDS, ids=lambda kind: kind if isinstance(kind, str) else f"op at level {kind}")
def backend(request):
    """The op as users call it, at every level of vector instructions that this CPU has; the CUDA kernel's source run on
    the CPU and, where there is one, a GPU; and its device."""
    if request.param == "emulated kernel":
        yield request.getfixturevalue("emulated").merge_weights, "cpu"
    elif request.param == "CUDA kernel":
        assert "merge_weights" in build_info()["kernels"]
        yield merge_weights, "cuda"
    else:
        assert has_cpu_kernel("merge_weights")
        with at_level(request.param):
            yield merge_weights, "cpu"


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


def rounds_factors(merge, device, *dtypes):
    """Whether what goes to bfloat16 comes from one TF32 product: in the kernel for GPUs, of sums in float32."""
    return (device == "cuda" or merge is not merge_weights) and torch.float64 not in dtypes


def of_factors(up, down, scale, size):
    """What rounding both factors to TF32 changes at most, relative to ``size``."""
    product = torch.einsum("or,ri->oi", up.cpu().double().abs(), down.cpu().double().abs())
    return float(2**-10 * abs(scale) * product.max() / size) if product.numel() and size else 0.0


def check(backend, merged, w, a, b, scale, dtype):
    for i, (weight, down, up) in enumerate(zip(w, a, b, strict=True)):
        out = dtype or weight.dtype
        assert (merged[i].dtype, merged[i].shape, merged[i].device) == (out, weight.shape, weight.device)
        exact = exact_merge(weight, down, up, scale[i])
        single = out == torch.float64 and torch.float64 not in (weight.dtype, down.dtype, up.dtype)
        size = max(exact.abs().max(), weight.abs().max().cpu()) if weight.numel() else None
        result = merged[i].float() if single else merged[i]  # sums were formed in float32
        once = out == torch.bfloat16 and rounds_factors(*backend, weight.dtype, down.dtype, up.dtype)
        more = of_factors(up, down, scale[i], size) if once else 0.0
        assert_rounded(result, exact, terms=len(down) + 1, what=f"merged[{i}]", size=size, more=more)


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
    check(backend, merge(w, a, b, scale=scale, dtype=out), w, a, b, scale, out)


@pytest.mark.parametrize("out", [None, torch.bfloat16], ids=str)
def test_every_matrix_has_a_dtype_of_its_own(backend, out):
    merge, device = backend
    w, a, b, scale = problems([(9, 36, 5), (20, 72, 3)] * 24, device, FLOATS)
    assert len({(weight.dtype, down.dtype, up.dtype) for weight, down, up in zip(w, a, b, strict=True)}) > 10
    check(backend, merge(w, a, b, scale=scale, dtype=out), w, a, b, scale, out)


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
    most = 0.99
    if dtype == torch.bfloat16 and rounds_factors(merge, device):
        off = of_factors(b, a, 0.1, 1.0)
        large, most = exact.abs() * torch.finfo(dtype).eps / 2 > off, 0.9  # where a unit is more than that
        assert ((merged.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + off).all()
    assert ((merged == neighbours).any(0) | ~large).all()
    assert (merged == nearest).float().mean() > most


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
            check(backend, merge([weight], [down], [up], scale=[0.5]), [weight], [down], [up], [0.5], None)


def test_a_thousand_problems(backend):
    merge, device = backend
    w, a, b, scale = problems([(1 + i % 3, 5 + i % 4, i % 4) for i in range(1000)], device)
    check(backend, merge(w, a, b, scale=scale), w, a, b, scale, None)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(13, 29, 5), (8, 48, 3), (9, 97, 2), (1, 400, 1)], ids=str)
@pytest.mark.usefixtures("every_level")
def test_reads_nothing_beyond_its_inputs(size, dtype, out):
    """Under a bug the process ends here."""
    rows, columns, r = size
    w = at_the_end_of_memory(rows, columns, dtype)
    a, b = at_the_end_of_memory(r, columns, torch.float32), at_the_end_of_memory(rows, r, torch.float32)
    check((merge_weights, "cpu"), merge_weights([w], [a], [b], scale=0.5, dtype=out), [w], [a], [b], [0.5], out)


@pytest.mark.usefixtures("every_level")
def test_threads_do_not_change_a_bit():
    w, a, b, scale = problems([(1000, 300, 16), (70, 900, 4)], "cpu", FLOATS[1:])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(merge_weights(w, a, b, scale=scale))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_no_problems():
    assert merge_weights([], [], [], scale=1.0) == []


# A fused weight with rows that nobody has before, between and after those of its adapters, which are not given in
# their order; a transposed one with one adapter; one without any; one element.
FUSED = [(150, 131), (40, 300), (7, 5), (1, 1)]
PLACES = [(0, 90, 150), (1, 0, 40), (0, 3, 50), (3, 0, 1), (0, 60, 60)]
RANKS = [17, 4, 3, 2, 5]


def fused(device, dtype, origin):
    w = [torch.randn(shape, device=device).to(dtype) for shape in FUSED]
    w[1] = w[1].T.contiguous().T
    a = [torch.randn(r, FUSED[k][1], device=device) for r, (k, *_) in zip(RANKS, PLACES, strict=True)]
    b = [torch.randn(stop - start, r, device=device) for r, (_, start, stop) in zip(RANKS, PLACES, strict=True)]
    has = {"none": (), "some": (0, 2, 4), "all": range(len(b))}[origin]
    origins = [torch.randn_like(up) if i in has else None for i, up in enumerate(b)]
    return w, a, b, origins


@pytest.mark.parametrize("origin", ["none", "some", "all"])
@pytest.mark.parametrize("out", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_row_ranges_and_origins(backend, dtype, out, origin):
    merge, device = backend
    w, a, b, origins = fused(device, dtype, origin)
    scale = [0.5, -2.0, 1.0, 0.25, 3.0]
    merged = merge(w, a, b, scale=scale, places=PLACES, origin=origins if origin != "none" else None, dtype=out)
    for k, weight in enumerate(w):
        exact = weight.cpu().double().clone()
        for (of, start, stop), down, up, b0, c in zip(PLACES, a, b, origins, scale, strict=True):
            if of == k:
                up = up.cpu().double() - (0 if b0 is None else b0.cpu().double())
                exact[start:stop] += c * up @ down.cpu().double()
        assert merged[k].dtype == (out or dtype)
        assert merged[k].is_contiguous()
        single = merged[k].dtype == torch.float64 and dtype != torch.float64
        result = merged[k].float() if single else merged[k]
        # B - B0 is rounded before the product, which has as many terms again
        assert_rounded(result, exact, terms=40, what=f"merged[{k}]")
        free = [i for i in range(len(weight)) if not any(k == of and s <= i < e for of, s, e in PLACES)]
        assert torch.equal(merged[k][free], weight[free].to(out or dtype))


@pytest.mark.parametrize("out", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_stacks_what_a_layer_multiplies_with_first(backend, dtype, out):
    """Exactly what a cast of each A gives."""
    merge, device = backend
    w, a, b, _ = fused(device, dtype, "none")
    a = [down.to(FLOATS[i % 4]) if dtype == torch.float64 else down for i, down in enumerate(a)]
    if merge is merge_weights:  # the op itself, which hands the stacks to layers only
        place = [number for of, start, stop in PLACES for number in (of, start, stop, -1)]
        _, stacked = OPS["merge_weights"].call(w, a, b, [], place, [1.0] * len(a), True, out)
    else:
        _, stacked = merge(w, a, b, scale=1.0, places=PLACES, stack=True, dtype=out)
    for k, rows in enumerate(stacked):
        mine = [down for down, place in zip(a, PLACES, strict=True) if place[0] == k]
        expected = torch.cat(
            [w[k].new_empty(0, w[k].shape[1], dtype=out or dtype), *(m.to(out or dtype) for m in mine)]
        )
        assert torch.equal(rows, expected)
        assert rows.dtype == (out or dtype)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ([0, 0, 3, -1, 0, 2, 5, -1], "two adapters"),
        ([0, 0, 3, -1, 0, 3, 6, -1], "rows of it"),
        ([0, 0, 3, -1, 1, 0, 3, -1], "a weight"),
        ([0, 0, 3, -1, 0, 3, 5, 0], "an origin"),
        ([0, 0, 3, -1, 0, 3, 5], "8 items"),
        ([0, 0, 3, -1, 0, 3, 4, -1], "shape of their rows"),
    ],
)
def test_what_would_reach_other_memory_is_refused_without_checks_too(device, place, message):
    w, a, b = ([torch.zeros(shape, device=device)] for shape in ((5, 2), (1, 2), (3, 1)))
    b += [torch.zeros(place[6] - place[5], 1, device=device) if "shape" not in message else b[0]]
    with pytest.raises(RuntimeError, match=f"merge_weights: .*{message}"):
        OPS["merge_weights"].call(w, a * 2, b, [], place, [1.0, 1.0], False, None)


@pytest.mark.parametrize(
    ("places", "origin", "message"),
    [
        ([(0, 0, 3), (0, 2, 5)], None, r"places must not overlap, .* 3 and from 2 .* w\[0\] at places\[0\] and"),
        ([(0, 0, 3), (0, 3, 6)], None, r"places\[1\] must .*<= 5, got \(0, 3, 6\)"),
        ([(0, 0, 3), (2, 0, 3)], None, r"places\[1\] must .*weight < 1, got \(2, 0, 3\)"),
        ([(0, 0, 3)], None, r"places must have one item for each of a, got 1 for 2"),
        ([(0, 0, 3), (0, 3, 5)], None, r"b\[1\] .* shape of w\[0\]\[3:5\], got \[3, 1\] .* for \[2, 2\]"),
        ([(0, 0, 3), (1, 0, 3)], [None], r"origin must have one item for each of b, got 1 for 2"),
        ([(0, 0, 3), (1, 0, 3)], [None, torch.zeros(2, 1)], r"origin\[1\] must .* got \[2, 1\] for \[3, 1\]"),
    ],
)
def test_refuses_places_and_origins(places, origin, message):
    w = [torch.zeros(5, 2), torch.zeros(3, 2)][: 1 + any(place[0] == 1 for place in places)]
    with pytest.raises(ValueError, match=f"^merge_weights: {message}"):
        merge_weights(w, [torch.zeros(1, 2)] * 2, [torch.zeros(3, 1)] * 2, scale=1.0, places=places, origin=origin)


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

    def merge_rows(w, a, b, b0):
        return merge_weights([w], [a, a], [b, b], scale=[0.5, 2.0], places=[(0, 0, 2), (0, 3, 5)], origin=[None, b0])[0]

    assert torch.autograd.gradcheck(merge_rows, (make(6, 4), make(2, 4), make(2, 2), make(2, 2)))


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
