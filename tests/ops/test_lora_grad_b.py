import pytest
import torch
from close import assert_rounded

from keeplora.ops import lora_grad_b

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def exact(x, dy, a, rows, scale):
    x, dy = x.cpu().double(), dy.cpu().double()
    t = [torch.einsum("ti,ri->tr", x, down.cpu().double()) for down in a]
    db = [c * torch.einsum("to,tr->or", dy[:, s:e], h) for (s, e), c, h in zip(rows, scale, t, strict=True)]
    return torch.cat(t, 1), db


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 37, 300])
def test_matches_float64(device, dtype, tokens):
    x, dy = (torch.randn(tokens, n, device=device).to(dtype) for n in (31, 48))
    a = [torch.randn(r, 31, device=device, dtype=torch.float32) for r in (4, 7, 1)]
    rows, scale = [(0, 16), (16, 32), (5, 5)], [0.5, -1.0, 2.0]
    t, db = lora_grad_b(x, dy, a, rows=rows, scale=scale)
    exact_t, exact_db = exact(x, dy, a, rows, scale)
    assert t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_rounded(t, exact_t, terms=31, what="t")
    for i in range(3):
        assert_rounded(db[i], exact_db[i], terms=31 + tokens, what=f"db[{i}]")


def test_is_the_gradient_of_a_lora_layer(device):
    x = torch.randn(9, 5, device=device, dtype=torch.float64)
    a, b = torch.randn(2, 5, device=device).double(), torch.randn(4, 2, device=device).double().requires_grad_()
    y = 0.7 * x @ a.T @ b.T
    dy = torch.randn_like(y)
    y.backward(dy)
    _, (db,) = lora_grad_b(x, dy, [a], rows=[(0, 4)], scale=0.7)
    assert_rounded(db, b.grad, terms=14, what="db")


def test_strided_inputs(device):
    x, dy = torch.randn(5, 9, device=device).t(), torch.randn(18, 6, device=device)[::2]
    a = [torch.randn(5, 3, device=device).t()]
    t, (db,) = lora_grad_b(x, dy, a, rows=[(1, 6)], scale=1.0)
    exact_t, (exact_db,) = exact(x, dy, a, [(1, 6)], [1.0])
    assert_rounded(t, exact_t, terms=5, what="t")
    assert_rounded(db, exact_db, terms=14, what="db")


def test_compiles_in_one_graph(device):
    x, dy, a = (torch.randn(s, device=device) for s in ((7, 5), (7, 6), (2, 5)))
    call = torch.compile(
        lambda x, dy: lora_grad_b(x, dy, [a], rows=[(0, 6)], scale=1.0), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(call(x, dy), lora_grad_b(x, dy, [a], rows=[(0, 6)], scale=1.0))


@pytest.mark.parametrize(
    ("x", "dy", "rows", "error", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(6, 5), [(0, 5)], ValueError, r"x must be a matrix .* got shape \[2, 3, 4\]"),
        (torch.zeros(6, 4), torch.zeros(5, 5), [(0, 5)], ValueError, r"dy must have the tokens of x"),
        (torch.zeros(6, 3), torch.zeros(6, 5), [(0, 5)], ValueError, r"a\[0\] must have as many columns as x"),
        (torch.zeros(6, 4), torch.zeros(6, 5), [(0, 6)], ValueError, r"stop <= 5 \(columns of dy\), got \(0, 6\)"),
        (torch.zeros(6, 4), torch.zeros(6, 5), [(3, 2)], ValueError, r"got \(3, 2\)"),
        (torch.zeros(6, 4), torch.zeros(6, 5), [], ValueError, r"rows must have one item for each of a"),
        (torch.zeros(6, 4).int(), torch.zeros(6, 5), [(0, 5)], TypeError, r"got torch.int32"),
    ],
)
def test_refuses(x, dy, rows, error, message):
    with pytest.raises(error, match=message):
        lora_grad_b(x, dy, [torch.zeros(2, 4)], rows=rows, scale=1.0)
