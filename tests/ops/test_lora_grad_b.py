import pytest
import torch
from close import assert_rounded

from keeplora.ops import build_info, lora_grad_b

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["op", "emulated kernel"] + (["CUDA kernel"] if torch.cuda.is_available() else [])


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The op as users call it, the CUDA kernel's source run on the CPU and, where there is one, a GPU; its device."""
    if request.param == "emulated kernel":
        return request.getfixturevalue("emulated").lora_grad_b, "cpu"
    if request.param == "CUDA kernel":
        assert "lora_grad_b" in build_info()["kernels"]
        return lora_grad_b, "cuda"
    return lora_grad_b, "cpu"


def exact(x, dy, a, rows, scale):
    x, dy = x.cpu().double(), dy.cpu().double()
    t = [torch.einsum("ti,ri->tr", x, down.cpu().double()) for down in a]
    db = [c * torch.einsum("to,tr->or", dy[:, s:e], h) for (s, e), c, h in zip(rows, scale, t, strict=True)]
    return torch.cat(t, 1), db


def check(result, x, dy, a, rows, scale):
    t, db = result
    double = torch.float64 in (x.dtype, dy.dtype, *(down.dtype for down in a))
    assert {m.dtype for m in (t, *db)} == {torch.float64 if double else torch.float32}
    exact_t, exact_db = exact(x, dy, a, rows, scale)
    assert_rounded(t, exact_t, terms=x.shape[1], what="t")
    for i, (actual, expected) in enumerate(zip(db, exact_db, strict=True)):
        assert_rounded(actual, expected, terms=sum(x.shape), what=f"db[{i}]")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 37, 300])
def test_matches_float64(backend, dtype, tokens):
    grad_b, device = backend
    x, dy = (torch.randn(tokens, n, device=device).to(dtype) for n in (31, 48))
    a = [torch.randn(r, 31, device=device, dtype=torch.float32) for r in (4, 7, 1)]
    rows, scale = [(0, 16), (16, 32), (5, 5)], [0.5, -1.0, 2.0]
    check(grad_b(x, dy, a, rows=rows, scale=scale), x, dy, a, rows, scale)


@pytest.mark.parametrize("ranks", [(16, 16, 16), (20,), (70, 0, 1), (33, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_several_tiles_in_each_direction(backend, dtype, ranks):
    """Tokens, inputs, ranks and outputs; the adapters' rows overlap."""
    grad_b, device = backend
    x, dy = (torch.randn(150, n, device=device).to(dtype) for n in (72, 136))
    a = [torch.randn(r, 72, device=device) for r in ranks]
    rows, scale = [(8 * i, 8 * i + 100) for i in range(len(a))], [1.0 - i for i in range(len(a))]
    check(grad_b(x, dy, a, rows=rows, scale=scale), x, dy, a, rows, scale)


@pytest.mark.parametrize("dtypes", [(a, b, c) for a in FLOATS for b in FLOATS for c in FLOATS[1:3]], ids=str)
def test_x_dy_and_a_have_dtypes_of_their_own(backend, dtypes):
    grad_b, device = backend
    x, dy, a = (torch.randn(s, device=device).to(d) for s, d in zip([(70, 40), (70, 9), (3, 40)], dtypes, strict=True))
    check(grad_b(x, dy, [a], rows=[(1, 9)], scale=[0.5]), x, dy, [a], [(1, 9)], [0.5])


def test_many_tokens(backend):
    """Their sums are divided among blocks."""
    grad_b, device = backend
    x, dy = torch.randn(12608, 9, device=device).bfloat16(), torch.randn(12608, 70, device=device).bfloat16()
    a, rows, scale = [torch.randn(r, 9, device=device) for r in (2, 3)], [(0, 70), (60, 70)], [1.0, -0.5]
    check(grad_b(x, dy, a, rows=rows, scale=scale), x, dy, a, rows, scale)


def test_many_adapters(backend):
    """Of small integers, so that every sum is exact."""
    grad_b, device = backend
    x, dy = (torch.randint(-4, 5, (5, n), device=device).float() for n in (6, 90))
    a = [torch.randint(-4, 5, (i % 3, 6), device=device).float() for i in range(70)]
    rows, scale = [(i, i + i % 5) for i in range(70)], [0.25 * (i - 30) for i in range(70)]
    t, db = grad_b(x, dy, a, rows=rows, scale=scale)
    exact_t, exact_db = exact(x, dy, a, rows, scale)
    assert torch.equal(t.cpu().double(), exact_t)
    assert all(torch.equal(actual.cpu().double(), expected) for actual, expected in zip(db, exact_db, strict=True))


def test_no_adapters(device):
    x, dy = torch.zeros(5, 6, device=device), torch.zeros(5, 3, device=device)
    t, db = lora_grad_b(x, dy, [], rows=[], scale=1.0)
    assert (t.shape, db) == ((5, 0), [])


def test_nothing_to_sum(backend):
    grad_b, device = backend
    zeros = [torch.zeros(s, device=device) for s in ((0, 4), (0, 5), (3, 4), (7, 0), (7, 5), (3, 0))]
    for x, dy, a in (zeros[:3], zeros[3:]):
        t, (db,) = grad_b(x, dy, [a], rows=[(1, 5)], scale=1.0)
        assert torch.equal(t, torch.zeros(len(x), 3, device=device))
        assert torch.equal(db, torch.zeros(4, 3, device=device))


def test_dependent_rows_of_a_get_equal_gradients(backend):
    grad_b, device = backend
    x, dy, a = (torch.randn(s, device=device) for s in ((90, 20), (90, 30), (3, 20)))
    _, (db,) = grad_b(x, dy, [torch.cat([a, torch.zeros(1, 20, device=device), a])], rows=[(0, 30)], scale=1.0)
    assert_rounded(db[:, 4:], db[:, :3].cpu().double(), terms=110, what="db of the same rows")
    assert torch.equal(db[:, 3], torch.zeros(30, device=device))


def test_kernel_gives_the_same_bits_in_any_order(emulated):
    x, dy = torch.randn(150, 40).bfloat16(), torch.randn(150, 70).bfloat16()
    a, rows = [torch.randn(r, 40) for r in (16, 3)], [(0, 70), (5, 20)]
    results = []
    for order, seed in (("sequential", 0), ("reversed", 0), ("random", 1), ("random", 2)):
        emulated.set_schedule(order, seed)
        t, db = emulated.lora_grad_b(x, dy, a, rows=rows, scale=[1.0, 0.5])
        results.append([t, *db])
    emulated.set_schedule("sequential")
    assert all(torch.equal(m, n) for other in results[1:] for m, n in zip(results[0], other, strict=True))


def test_is_the_gradient_of_a_lora_layer(device):
    x = torch.randn(9, 5, device=device, dtype=torch.float64)
    a, b = torch.randn(2, 5, device=device).double(), torch.randn(4, 2, device=device).double().requires_grad_()
    y = 0.7 * x @ a.T @ b.T
    dy = torch.randn_like(y)
    y.backward(dy)
    _, (db,) = lora_grad_b(x, dy, [a], rows=[(0, 4)], scale=0.7)
    assert_rounded(db, b.grad, terms=14, what="db")


def test_strided_and_unaligned_inputs(backend):
    grad_b, device = backend
    x, dy = torch.randn(5, 9, device=device).t(), torch.randn(18, 6, device=device)[::2]
    a = [torch.randn(5, 3, device=device).t()]
    check(grad_b(x, dy, a, rows=[(1, 6)], scale=[1.0]), x, dy, a, [(1, 6)], [1.0])
    for dtype in (torch.float32, torch.bfloat16):
        wide, a = torch.randn(70, 101, device=device).to(dtype), [torch.randn(3, 41, device=device)[:, 1:]]
        for x, dy in ((wide[:, :40], wide[:, 40:]), (wide[:, 1:41], wide[:, ::3]), (wide[::2, 8:48], wide[1::2, 3:60])):
            check(grad_b(x, dy, a, rows=[(3, 20)], scale=[1.0]), x, dy, a, [(3, 20)], [1.0])


def test_compiles_in_one_graph(device):
    x, dy, a = (torch.randn(s, device=device) for s in ((7, 5), (7, 6), (2, 5)))
    call = torch.compile(
        lambda x, dy: lora_grad_b(x, dy, [a], rows=[(0, 6)], scale=1.0), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(call(x, dy), lora_grad_b(x, dy, [a], rows=[(0, 6)], scale=1.0))


@pytest.mark.parametrize(
    ("x", "dy", "rows", "error", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(6, 5), [(0, 5)], ValueError, r": x must .* got .*\[2, 3, 4\]"),
        (torch.zeros(6, 4), torch.zeros(5, 5), [(0, 5)], ValueError, r": dy must .* got \[5, 5\] for .*\[6, 4\]"),
        (torch.zeros(6, 3), torch.zeros(6, 5), [(0, 5)], ValueError, r": a\[0\] must .* got \[2, 4\] for \[6, 3\]"),
        (torch.zeros(6, 4), torch.zeros(6, 5), [(0, 6)], ValueError, r": rows\[0\] must .* 5 .* got \(0, 6\)"),
        (torch.zeros(6, 4), torch.zeros(6, 5), [(3, 2)], ValueError, r": rows\[0\] must .* got \(3, 2\)"),
        (torch.zeros(6, 4), torch.zeros(6, 5), [], ValueError, r": rows must .*\ba, got 0 for 1"),
        (torch.zeros(6, 4).int(), torch.zeros(6, 5), [(0, 5)], TypeError, r": x must .* got torch.int32"),
    ],
)
def test_refuses(x, dy, rows, error, message):
    with pytest.raises(error, match="^lora_grad_b" + message):
        lora_grad_b(x, dy, [torch.zeros(2, 4)], rows=rows, scale=1.0)
