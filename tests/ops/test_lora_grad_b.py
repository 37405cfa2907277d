import itertools

import pytest
import torch
from close import assert_rounded
from guarded import at_the_end_of_memory
from ops.conftest import at_level, cpu_levels, has_cpu_kernel

from keeplora.ops import build_info, lora_grad_b
from keeplora.ops.declare import OPS

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [*cpu_levels(), "emulated kernel"] + (["CUDA kernel"] if torch.cuda.is_available() else [])


@pytest.fixture(params=BACKENDS, ids=lambda kind: kind if isinstance(kind, str) else f"op at level {kind}")
def backend(request):
    """The op as users call it, at every level of vector instructions that this CPU has; the CUDA kernel's source run on
    the CPU and, where there is one, a GPU; and its device."""
    if request.param == "emulated kernel":
        yield request.getfixturevalue("emulated").lora_grad_b, "cpu"
    elif request.param == "CUDA kernel":
        assert "lora_grad_b" in build_info()["kernels"]
        yield lora_grad_b, "cuda"
    else:
        assert has_cpu_kernel("lora_grad_b")
        with at_level(request.param):
            yield lora_grad_b, "cpu"


def exact(dy, t, columns, rows, scale):
    dy, t = dy.cpu().double(), t.cpu().double()
    return [
        c * torch.einsum("to,tr->or", dy[:, s:e], t[:, p:q])
        for (p, q), (s, e), c in zip(columns, rows, scale, strict=True)
    ]


def check(db, dy, t, columns, rows, scale):
    double = torch.float64 in (dy.dtype, t.dtype)
    truth = exact(dy, t, columns, rows, scale)
    for i, (actual, expected) in enumerate(zip(db, truth, strict=True)):
        assert actual.dtype == (torch.float64 if double else torch.float32)
        assert_rounded(actual, expected, terms=len(dy), what=f"db[{i}]")


def spans(ranks):
    """The adapters' columns of t, one after the other."""
    ends = list(itertools.accumulate(ranks))
    return list(zip([0, *ends[:-1]], ends, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 37, 300])
def test_matches_float64(backend, dtype, tokens):
    """An adapter without rows, and columns of t that nobody asks for, as those of an adapter that is not trained."""
    grad_b, device = backend
    dy, t = (torch.randn(tokens, n, device=device).to(dtype) for n in (48, 14))
    columns, rows, scale = [(0, 4), (6, 13), (13, 14)], [(0, 16), (16, 32), (5, 5)], [0.5, -1.0, 2.0]
    check(grad_b(dy, t, columns=columns, rows=rows, scale=scale), dy, t, columns, rows, scale)


@pytest.mark.parametrize("ranks", [(16, 16, 16), (20,), (70, 0, 1), (33, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_several_tiles_in_each_direction(backend, dtype, ranks):
    """Tokens, ranks and outputs; the adapters' rows overlap."""
    grad_b, device = backend
    dy, t = (torch.randn(150, n, device=device).to(dtype) for n in (136, sum(ranks)))
    rows, scale = [(8 * i, 8 * i + 100) for i in range(len(ranks))], [1.0 - i for i in range(len(ranks))]
    check(grad_b(dy, t, columns=spans(ranks), rows=rows, scale=scale), dy, t, spans(ranks), rows, scale)


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 33, 47, 65, 383, 385, 800])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_one_less_and_one_more_than_a_tile(backend, dtype, width):
    grad_b, device = backend
    dy, t = torch.randn(33, width + 3, device=device).to(dtype), torch.randn(33, 9, device=device).to(dtype)
    columns, rows, scale = [(0, 9), (2, 9)], [(3, width + 3), (1, width)], [1.0, -2.0]
    check(grad_b(dy, t, columns=columns, rows=rows, scale=scale), dy, t, columns, rows, scale)


@pytest.mark.parametrize("dtypes", [(a, b) for a in FLOATS for b in FLOATS], ids=str)
def test_dy_and_t_have_dtypes_of_their_own(backend, dtypes):
    grad_b, device = backend
    dy, t = (torch.randn(s, device=device).to(d) for s, d in zip([(70, 9), (70, 3)], dtypes, strict=True))
    check(grad_b(dy, t, columns=[(0, 3)], rows=[(1, 9)], scale=[0.5]), dy, t, [(0, 3)], [(1, 9)], [0.5])


def test_many_tokens(backend):
    """Their sums are divided among blocks."""
    grad_b, device = backend
    dy, t = torch.randn(12608, 70, device=device).bfloat16(), torch.randn(12608, 5, device=device).bfloat16()
    columns, rows, scale = [(0, 2), (2, 5)], [(0, 70), (60, 70)], [1.0, -0.5]
    check(grad_b(dy, t, columns=columns, rows=rows, scale=scale), dy, t, columns, rows, scale)


def test_many_adapters(backend):
    """Of small integers, so that every sum is exact."""
    grad_b, device = backend
    dy, t = (torch.randint(-4, 5, (5, n), device=device).float() for n in (90, 69))
    columns, rows = spans([i % 3 for i in range(70)]), [(i, i + i % 5) for i in range(70)]
    scale = [0.25 * (i - 30) for i in range(70)]
    db = grad_b(dy, t, columns=columns, rows=rows, scale=scale)
    truth = exact(dy, t, columns, rows, scale)
    assert all(torch.equal(actual.cpu().double(), expected) for actual, expected in zip(db, truth, strict=True))


def test_no_adapters(device):
    assert (
        lora_grad_b(torch.zeros(5, 6, device=device), torch.zeros(5, 0, device=device), columns=[], rows=[], scale=1.0)
        == []
    )


def test_nothing_to_sum(backend):
    grad_b, device = backend
    dy, t = torch.zeros(0, 5, device=device), torch.zeros(0, 3, device=device)
    (db,) = grad_b(dy, t, columns=[(0, 3)], rows=[(1, 5)], scale=1.0)
    assert torch.equal(db, torch.zeros(4, 3, device=device))


def test_kernel_gives_the_same_bits_in_any_order(emulated):
    dy, t = torch.randn(700, 70).bfloat16(), torch.randn(700, 19)
    columns, rows = [(0, 16), (16, 19)], [(0, 70), (5, 20)]
    results = []
    for order, seed in (("sequential", 0), ("reversed", 0), ("random", 1), ("random", 2)):
        emulated.set_schedule(order, seed)
        results.append(emulated.lora_grad_b(dy, t, columns=columns, rows=rows, scale=[1.0, 0.5]))
    emulated.set_schedule("sequential")
    assert all(torch.equal(m, n) for other in results[1:] for m, n in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("every_level")
def test_threads_do_not_change_a_bit():
    dy, t = torch.randn(3000, 900).bfloat16(), torch.randn(3000, 40).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(lora_grad_b(dy, t, columns=[(0, 16), (16, 40)], rows=[(0, 900), (5, 890)], scale=1.0))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_is_the_gradient_of_a_lora_layer(device):
    x = torch.randn(9, 5, device=device, dtype=torch.float64)
    a, b = torch.randn(2, 5, device=device).double(), torch.randn(4, 2, device=device).double().requires_grad_()
    y = 0.7 * x @ a.T @ b.T
    dy = torch.randn_like(y)
    y.backward(dy)
    (db,) = lora_grad_b(dy, x @ a.T, columns=[(0, 2)], rows=[(0, 4)], scale=0.7)
    assert_rounded(db, b.grad, terms=14, what="db")


def test_strided_and_unaligned_inputs(backend):
    grad_b, device = backend
    for dtype in (torch.float32, torch.bfloat16):
        wide = torch.randn(70, 101, device=device).to(dtype)
        for dy, t in (
            (wide[:, :40], wide[:, 40:60]),
            (wide[:, 1:41], wide[:, 1::9]),
            (wide[::2, 8:48], wide[1::2, 3:23]),
            (wide.T[:70], torch.randn(11, 70, device=device).to(dtype).T),
            (wide[:1].expand(70, 101), wide[:, :1].expand(70, 7)),
            (wide.new_ones(()).expand(70, 30), wide[:, 2:9]),  # as the gradient of a sum is
        ):
            check(grad_b(dy, t, columns=[(1, 7)], rows=[(3, 20)], scale=[1.0]), dy, t, [(1, 7)], [(3, 20)], [1.0])


@pytest.mark.parametrize("size", [(13, 29, 5), (24, 16, 16), (7, 100, 17), (33, 47, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("every_level")
def test_reads_nothing_beyond_its_inputs(dtype, size):
    """Under a bug the process ends here."""
    tokens, out, r = size
    dy, t = (at_the_end_of_memory(tokens, n, dtype) for n in (out, r))
    check(lora_grad_b(dy, t, columns=[(0, r)], rows=[(0, out)], scale=1.0), dy, t, [(0, r)], [(0, out)], [1.0])


def test_compiles_in_one_graph(device):
    dy, t = (torch.randn(s, device=device) for s in ((7, 6), (7, 2)))

    def call(dy, t):
        return lora_grad_b(dy, t, columns=[(0, 2)], rows=[(0, 6)], scale=1.0)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(dy, t), call(dy, t))


@pytest.mark.parametrize(
    ("place", "message"),
    [([0, 3, 0, 5], "<= 2"), ([0, 2, 3, 6], "<= 5"), ([0, 2, -1, 5], "<= 5"), ([0, 2], "4 numbers")],
)
def test_what_would_reach_other_memory_is_refused_without_checks_too(device, place, message):
    with pytest.raises(RuntimeError, match=f"lora_grad_b: place must .*{message}"):
        OPS["lora_grad_b"].call(torch.zeros(6, 5, device=device), torch.zeros(6, 2, device=device), place, [1.0])


@pytest.mark.parametrize(
    ("dy", "columns", "rows", "error", "message"),
    [
        (torch.zeros(2, 3, 4), [(0, 2)], [(0, 5)], ValueError, r": dy must .* got .*\[2, 3, 4\]"),
        (torch.zeros(5, 5), [(0, 2)], [(0, 5)], ValueError, r": t must .* got \[6, 2\] for .*\[5, 5\]"),
        (torch.zeros(6, 5), [(0, 3)], [(0, 5)], ValueError, r": columns\[0\] must .* 2 .* got \(0, 3\)"),
        (torch.zeros(6, 5), [(0, 2)], [(0, 6)], ValueError, r": rows\[0\] must .* 5 .* got \(0, 6\)"),
        (torch.zeros(6, 5), [(0, 2)], [(3, 2)], ValueError, r": rows\[0\] must .* got \(3, 2\)"),
        (torch.zeros(6, 5), [(0, 2)], [], ValueError, r": rows must .*\bcolumns, got 0 for 1"),
        (torch.zeros(6, 5).int(), [(0, 2)], [(0, 5)], TypeError, r": dy must .* got torch.int32"),
    ],
)
def test_refuses(dy, columns, rows, error, message):
    with pytest.raises(error, match="^lora_grad_b" + message):
        lora_grad_b(dy, torch.zeros(6, 2), columns=columns, rows=rows, scale=1.0)
