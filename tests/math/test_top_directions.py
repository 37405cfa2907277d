"""top_directions of keeplora.math.lowrank: where a task wants to go."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keeplora.math import batch, lowrank, sketch
from keeplora.math.lowrank import top_directions
from tests.math.spectra import SPECTRA, f64, matrix, off_identity, orthonormal, sine, tensor

DTYPES = [torch.float32, torch.float64]
LEAK = {torch.float32: 1e-6, torch.float64: 1e-14}
# (out, in, k, r): exact and sketched, wide and tall, nothing protected, little and nothing left
CASES = [
    (300, 257, 40, 8), (200, 200, 0, 16), (120, 400, 300, 1), (400, 150, 10, 5), (90, 513, 7, 3),
    (64, 64, 20, 16), (5, 40, 3, 8), (40, 5, 2, 5), (33, 33, 32, 4), (7, 7, 7, 2), (1, 1, 0, 1),
]  # fmt: skip


def problem(out, d, k, spectrum, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return tensor(matrix(out, d, spectrum, rng), dtype), tensor(orthonormal(d, k, rng), dtype)


def exact_svd(g, q):
    g, q = f64(g), f64(q)
    return g - g @ q @ q.T, *np.linalg.svd(g - g @ q @ q.T, full_matrices=False)


def leak(found, q):
    a = f64(found.a)
    return np.linalg.norm(a @ f64(q)) / max(np.linalg.norm(a), 1e-300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_captures_what_the_best_directions_capture(case, spectrum, dtype):
    out, d, k, r = case
    g, q = problem(out, d, k, spectrum, dtype)
    (top,) = top_directions([g], [q], r)
    projected, _, s, vt = exact_svd(g, q)
    wanted = min(r, int((s > 1e-5 * np.linalg.norm(f64(g))).sum()))
    assert len(top.s) == wanted
    assert (top.a.shape, top.b.shape) == ((wanted, d), (out, wanted))
    assert top.a.dtype == top.s.dtype == top.b.dtype == dtype
    assert off_identity(top.a.T) <= 5 * LEAK[dtype]
    assert off_identity(top.b) <= 5 * LEAK[dtype]
    assert leak(top, q) <= LEAK[dtype]
    assert (top.s[:-1] >= top.s[1:] * (1 - 1e-6)).all()
    if not wanted:
        return
    captured = np.linalg.norm(projected @ f64(top.a).T) ** 2
    # Clusters hide their best directions from any sketch, and do not matter: all directions in one are as good.
    assert captured >= (0.96 if spectrum == "clustered" else 0.998) * (s[:wanted] ** 2).sum()
    # b diag(s) is the image of a.
    image = f64(top.b) * f64(top.s)
    assert np.abs(image - projected @ f64(top.a).T).max() <= 40 * torch.finfo(dtype).eps * np.linalg.norm(f64(g))
    if spectrum == "deficient" and wanted < r:
        assert sine(f64(top.a).T, vt[:wanted].T) <= 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("path", ["sketch", "exact"])
@pytest.mark.parametrize("shape", [(150, 180, 60), (180, 150, 0), (60, 200, 150)], ids=str)
def test_exact_path_is_exact_and_sketch_is_close(path, shape, monkeypatch):
    monkeypatch.setattr(lowrank, "EXACT_SHARE", 1e9 if path == "sketch" else 0.0)
    out, d, k = shape
    g, q = problem(out, d, k, "power", torch.float32)
    (top,) = top_directions([g], [q], 4)
    _, _, s, vt = exact_svd(g, q)
    assert sine(f64(top.a).T, vt[:4].T) < (1e-5 if path == "exact" else 2e-2)
    np.testing.assert_allclose(f64(top.s), s[:4], rtol=1e-6 if path == "exact" else 1e-3)


def dominated(count, size, fall):
    """``count`` directions that hold nearly all energy, and others behind them."""

    def sigma(i):
        return np.where(i <= count, size, 1.0) * i**-fall

    return sigma


DOMINATED = {
    "one": dominated(1, 200, 0.5),
    "one, and a slow rest": dominated(1, 1e4, 0.3),
    "half of them": dominated(8, 200, 0.5),
    "all but the last": dominated(15, 200, 0.5),
    "none": dominated(0, 1, 0.5),
}


@pytest.mark.parametrize("together", ["one by one", "batched"])
@pytest.mark.parametrize("kind", DOMINATED)
@pytest.mark.parametrize("d", [256, 400])
def test_the_last_direction_is_as_good_as_the_first(d, kind, together, monkeypatch):
    """Adam learns along every row of A alike: what one direction holds must not hide the others."""
    if together == "batched":
        monkeypatch.setattr(batch, "batched", lambda tensor: True)
        monkeypatch.setattr(lowrank, "batched", lambda tensor: True)
    rng = np.random.default_rng(d)
    s = DOMINATED[kind](np.arange(1, d + 1, dtype=np.float64))
    exact = (orthonormal(d, d, rng) * s) @ orthonormal(d, d, rng).T
    (top,) = top_directions([tensor(exact)], [torch.zeros(d, 0)], 16)
    held = np.linalg.norm(exact @ f64(top.a).T, axis=0) ** 2
    for first in range(16):
        assert held[first:].sum() >= 0.98 * (s[first:16] ** 2).sum(), first


def worst_tail(top, exact, s):
    """The least share of the best energy that directions ``i … r`` hold, over all i."""
    held = np.linalg.norm(exact @ f64(top.a).T, axis=0) ** 2
    return min(held[i:].sum() / (s[i : len(held)] ** 2).sum() for i in range(len(held)))


@pytest.mark.parametrize("together", ["one by one", "batched"])
def test_a_layer_whose_worst_direction_may_still_gain_gets_more_steps_alone(together, monkeypatch):
    if together == "batched":
        monkeypatch.setattr(batch, "batched", lambda tensor: True)
        monkeypatch.setattr(lowrank, "batched", lambda tensor: True)
    rng = np.random.default_rng(0)
    u, v = orthonormal(400, 400, rng), orthonormal(400, 400, rng)
    spectra = [np.arange(1, 401, dtype=np.float64) ** -fall for fall in (1.0, 0.1, 2.0)]
    exact = [(u * s) @ v.T for s in spectra]
    g, q = [tensor(m) for m in exact], [torch.zeros(400, 0), torch.zeros(400, 3), torch.zeros(400, 0)]
    groups = []
    real = lowrank.row_space
    monkeypatch.setattr(
        lowrank, "row_space", lambda g, *args, **kw: (groups.append((len(g), kw["steps"])), real(g, *args, **kw))[1]
    )
    tops = top_directions(g, q, 8)
    assert [count for count, steps in groups if steps > lowrank.STEPS] == [1]
    assert [worst_tail(top, m, s) >= 0.995 for top, m, s in zip(tops, exact, spectra, strict=True)] == [True] * 3
    groups.clear()
    others = top_directions([g[0], g[2]], [q[0], q[2]], 8)
    assert all(steps == lowrank.STEPS for _, steps in groups)
    for one, other in zip((tops[0], tops[2]), others, strict=True):
        torch.testing.assert_close(one.s, other.s)


@pytest.mark.parametrize("fall", [1.0, 2.0])
def test_steps_that_no_direction_gains_from_are_not_made(fall, monkeypatch):
    rng = np.random.default_rng(0)
    s = np.arange(1, 401, dtype=np.float64) ** -fall
    g = tensor((orthonormal(400, 400, rng) * s) @ orthonormal(400, 400, rng).T)
    steps = []
    real = sketch._orthonormalize
    monkeypatch.setattr(sketch, "_orthonormalize", lambda *args: (steps.append(1), real(*args))[1])
    top_directions([g], [torch.zeros(400, 0)], 16)
    assert len(steps) == 3  # blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "d", "k", "r"), [(200, 190, 60, 6), (20, 30, 12, 6)])
def test_a_gradient_inside_the_basis_has_no_direction(out, d, k, r, dtype):
    rng = np.random.default_rng(0)
    q = tensor(orthonormal(d, k, rng), dtype)
    inside = tensor(rng.standard_normal((out, k)) @ f64(q).T, dtype)
    for g in (inside, torch.zeros_like(inside), 1e20 * inside if dtype == torch.float64 else 1e10 * inside):
        (top,) = top_directions([g], [q], r)
        assert (top.a.shape, top.s.shape, top.b.shape) == ((0, d), (0,), (out, 0))


def test_a_small_part_outside_the_basis_is_found_and_measured():
    rng = np.random.default_rng(4)
    frame = orthonormal(160, 64, rng)
    q = tensor(frame[:, :60])
    outside = orthonormal(150, 4, rng) @ np.diag([4.0, 3.0, 2.0, 1.0]) @ frame[:, 60:].T
    g = tensor(rng.standard_normal((150, 60)) @ frame[:, :60].T + 1e-2 * outside)
    (top,) = top_directions([g], [q], 2)
    assert len(top.s) == 2
    assert leak(top, q) <= 1e-6
    projected = exact_svd(g, q)[0]
    captured = np.linalg.norm(projected @ f64(top.a).T) ** 2 / np.linalg.norm(projected) ** 2
    assert captured == pytest.approx(25 / 30, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_keeps_the_contract(data):
    out, d = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    k, r = data.draw(st.integers(0, d)), data.draw(st.integers(1, d))
    g, q = problem(out, d, k, data.draw(st.sampled_from(list(SPECTRA))), torch.float32, seed=out + 31 * d)
    (top,) = top_directions([g], [q], r, seed=data.draw(st.integers(0, 2**40)))
    assert len(top.s) <= min(r, out, d - k)
    assert leak(top, q) <= 1e-6
    assert off_identity(top.a.T) <= 5e-6


@pytest.mark.parametrize("together", ["as the device wants", "batched"])
def test_layers_do_not_see_each_other(device, together, monkeypatch):
    if together == "batched":
        monkeypatch.setattr(batch, "batched", lambda tensor: True)
    shapes = [(150, 160, 20), (150, 160, 35), (70, 60, 0), (60, 70, 70), (30, 40, 20), (30, 40, 20), (30, 40, 25)]
    ranks = [3, 5, 2, 1, 4, 2, 3]
    g, q = zip(
        *((t.to(device) for t in problem(*s, "power", torch.float32, seed=i)) for i, s in enumerate(shapes)),
        strict=True,
    )
    all_of_them = top_directions(g, q, ranks)
    for i, r in enumerate(ranks):
        (alone,) = top_directions([g[i]], [q[i]], r)
        torch.testing.assert_close(alone.s, all_of_them[i].s)
        torch.testing.assert_close(
            (alone.a @ all_of_them[i].a.T).abs(), torch.eye(len(alone.s), device=device), rtol=0, atol=1e-3
        )
    assert len(all_of_them[3].s) == 0
    assert top_directions([], [], 4) == []


def test_seed_alone_decides_the_bits():
    g, q = problem(200, 180, 30, "slow", torch.float32)
    before = g.clone(), q.clone()
    state = torch.random.get_rng_state()
    first = top_directions([g], [q], 8, seed=5)[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1234)
    again = top_directions([g], [q], 8, seed=5)[0]
    other = top_directions([g], [q], 8, seed=6)[0]
    assert torch.equal(first.a, again.a)
    assert torch.equal(first.b, again.b)
    assert not torch.equal(first.a, other.a)
    assert torch.equal(g, before[0])
    assert torch.equal(q, before[1])


def test_strided_input():
    g, q = problem(90, 80, 9, "power", torch.float32)
    expected = top_directions([g], [q], 3)[0]
    wide = torch.stack([g, g], 2)
    found = top_directions([wide[:, :, 0]], [q.T.contiguous().T], 3)[0]
    torch.testing.assert_close(found.s, expected.s)


G, Q = torch.ones(4, 6), torch.eye(6)[:, :2]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: top_directions(G, [Q], 1), TypeError, "g must be a sequence of matrices, got a single tensor"),
        (lambda: top_directions([G], [Q, Q], 1), ValueError, "got 2 for 1"),
        (lambda: top_directions([G[0]], [Q], 1), ValueError, r"g\[0\] must be a matrix"),
        (lambda: top_directions([G.bfloat16()], [Q], 1), TypeError, "got torch.bfloat16"),
        (lambda: top_directions([G], [Q.double()], 1), TypeError, r"q\[0\] must have the dtype and device of g\[0\]"),
        (lambda: top_directions([G.T], [Q], 1), ValueError, r"q\[0\] must have as many rows as g\[0\] has columns"),
        (lambda: top_directions([G], [torch.ones(6, 7)], 1), ValueError, "at most as many columns as rows"),
        (lambda: top_directions([G], [Q], 0), ValueError, r"rank must lie in 1 … 6 .*, got 0 at 0"),
        (lambda: top_directions([G, G], [Q, Q], [1, 7]), ValueError, "got 7 at 1"),
        (lambda: top_directions([G], [Q], [1, 1]), ValueError, "got 2 for 1 layers"),
        (lambda: top_directions([G], [Q], [1.0]), TypeError, r"rank must be an int, got 1\.0 at 0"),
        (lambda: top_directions([G], [Q], 2.0), TypeError, r"rank must be .*got 2\.0"),
        (lambda: top_directions([G], [Q], "2"), TypeError, r"rank must be .*got '2'"),
        (lambda: top_directions([G], [Q], True), TypeError, r"rank must be .*got True"),
        (lambda: top_directions([G * float("nan")], [Q], 1), ValueError, r"g\[0\] must be finite, got nan at \[0, 0\]"),
        (lambda: top_directions([G], [Q / 0], 1), ValueError, r"q\[0\] must be finite"),
        (lambda: top_directions([G], [Q * 1.1], 1, check_basis=True), ValueError, "must have orthonormal columns"),
    ],
)  # fmt: skip
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
