import numpy as np
import pytest
import torch

from keeplora.math import batch
from keeplora.math.lowrank import Extension, extend_basis, top_directions, weight_basis
from tests.math.spectra import (
    SPECTRA,
    away_from_ties,
    f64,
    matrix,
    off_identity,
    orthonormal,
    sine,
    smallest_rank,
    tensor,
)  # fmt: skip

DTYPES = [torch.float32, torch.float64]
ORTHOGONAL = {torch.float32: 5e-6, torch.float64: 1e-13}
SHAPES = [(96, 96), (257, 64), (65, 301), (1, 40), (40, 1), (5, 3)]


def moment(d, spectrum, seed, rows=None):
    """A second moment whose eigenvalues are the squares of ``SPECTRA[spectrum]``."""
    x = matrix(rows or d, d, spectrum, np.random.default_rng(seed))
    return x.T @ x


def gap(values, k):
    """Distance of eigenvalue k to the next, as a fraction of the largest: angles are known to rounding over it."""
    return (values[k - 1] - values[k]) / values[0] if 0 < k < len(values) else 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_basis_is_the_leading_right_singular_space(shape, spectrum, dtype):
    w = tensor(matrix(*shape, spectrum, np.random.default_rng(sum(shape))), dtype)
    _, s, vt = np.linalg.svd(f64(w), full_matrices=False)
    energies, total = s**2, (s**2).sum()
    for threshold in (0.0, 0.2, 0.6, 0.85, 0.97, 0.999):
        (q,) = weight_basis([w], threshold)
        if away_from_ties(energies, total, threshold) or threshold == 0:
            assert q.shape == (shape[1], smallest_rank(energies, total, threshold))
        assert q.dtype == dtype
        assert off_identity(q) <= ORTHOGONAL[dtype]
        captured = np.linalg.norm(f64(w) @ f64(q)) ** 2 / total
        assert captured >= threshold - 1e-6
        k = q.shape[1]
        if gap(energies, k) > 1e-3:  # Davis-Kahan: the rounding of a product of `side` terms over the gap
            rounding = 4 * max(shape) ** 0.5 * torch.finfo(dtype).eps
            assert sine(f64(q), vt[:k].T) <= rounding / gap(energies, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_basis_of_everything_leaves_out_the_noise(dtype):
    rng = np.random.default_rng(1)
    made = tensor(rng.standard_normal((90, 7)), dtype) @ tensor(rng.standard_normal((7, 50)), dtype)
    full = tensor(matrix(50, 50, "power", rng), dtype)
    deficient, complete = weight_basis([made, full], 1.0)
    assert deficient.shape == (50, 7)
    assert complete.shape == (50, 50)


def test_weight_basis_of_nothing(device):
    for q in weight_basis([torch.zeros(4, 6, device=device), torch.zeros(6, 4, device=device)], 1.0):
        assert q.shape[1] == 0
    assert weight_basis([], 0.5) == []


def test_weight_basis_output_side_is_for_parity_only():
    w = torch.randn(20, 20)
    (q,) = weight_basis([w], 0.7, side="output")
    u = np.linalg.svd(f64(w))[0]
    assert sine(f64(q), u[:, : q.shape[1]]) < 1e-4
    with pytest.raises(ValueError, match=r'w\[1\] must be square for side="output", got shape \[3, 2\]'):
        weight_basis([w, torch.randn(3, 2)], 0.5, side="output")


def test_weight_basis_takes_half_precision_and_one_threshold_per_layer():
    w = torch.randn(30, 30).bfloat16()
    half, full = weight_basis([w, w.float()], [0.5, 0.9])
    assert half.dtype == torch.float32
    assert half.shape[1] < full.shape[1]
    assert torch.equal(half, weight_basis([w.float()], 0.5)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("d", "k"), [(96, 0), (97, 30), (64, 60), (33, 33), (3, 1), (1, 0)])
def test_extension_is_the_leading_space_of_what_is_left(d, k, spectrum, dtype):
    rng = np.random.default_rng(d + k)
    c, q = tensor(moment(d, spectrum, seed=d), dtype), tensor(orthonormal(d, k, rng), dtype)
    c = (c + c.T) / 2
    c64, q64 = f64(c), f64(q)
    p = np.eye(d) - q64 @ q64.T
    values, vectors = np.linalg.eigh(p @ c64 @ p)
    values, vectors = np.clip(values[::-1], 0, None)[: d - k], vectors[:, ::-1]
    total, held = np.trace(c64), np.trace(q64.T @ c64 @ q64)
    for threshold in (0.0, 0.3, 0.9, 0.99):
        (new,) = extend_basis([q], [c], threshold)
        if away_from_ties(values, total, threshold, held):
            assert new.added == smallest_rank(values, total, threshold, held)
        assert torch.equal(new.q[:, :k], q)
        assert new.q.shape == (d, k + new.added)
        assert new.q.dtype == dtype
        assert off_identity(new.q) <= ORTHOGONAL[dtype]
        inside = np.trace(f64(new.q).T @ c64 @ f64(new.q))
        assert new.total == pytest.approx(total, rel=1e-6)
        assert new.captured == pytest.approx(inside, rel=2e-6)
        if k < d:
            assert new.fraction >= threshold - 1e-5
        if new.added and gap(values, new.added) > 1e-3:
            leading = vectors[:, : new.added]
            rounding = 8 * d**0.5 * torch.finfo(dtype).eps
            assert sine(f64(new.q[:, k:]), leading) <= rounding / gap(values, new.added)


@pytest.mark.parametrize("dtype", DTYPES)
def test_twenty_tasks_keep_the_basis_orthonormal_and_append_only(dtype):
    d, rng = 120, np.random.default_rng(0)
    q = weight_basis([tensor(matrix(d, d, "power", rng), dtype)], 0.5)[0]
    held = []
    for task in range(20):
        x = tensor(matrix(3 * d, d, "power", rng) @ np.diag(np.linspace(0.1, 1, d)), dtype)
        (new,) = extend_basis([q], [x.T @ x], 0.6 + 0.02 * task)
        assert torch.equal(new.q[:, : q.shape[1]], q)
        q = new.q
        held.append(q.shape[1])
    assert off_identity(q) <= ORTHOGONAL[dtype]
    assert held == sorted(held)
    assert held[0] < held[-1] <= d


def test_no_more_than_all_directions():
    d = 24
    q = torch.zeros(d, 0)
    for seed in range(6):
        x = torch.randn(200, d, generator=torch.Generator().manual_seed(seed))
        (new,) = extend_basis([q], [x.T @ x], 1.0)
        q = new.q
    assert q.shape == (d, d)
    assert new.added == 0
    assert new.fraction == pytest.approx(1.0, abs=1e-6)
    assert off_identity(q) <= 5e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_the_energy_of_a_deficient_moment_is_its_rank(dtype):
    x = torch.randn(300, 9, dtype=dtype) @ torch.randn(9, 64, dtype=dtype)
    q = torch.zeros(64, 0, dtype=dtype)
    (new,) = extend_basis([q], [x.T @ x], 1.0)
    assert new.added == 9
    assert extend_basis([new.q], [x.T @ x], 1.0)[0].added == 0


def test_no_energy_adds_nothing(device):
    q = torch.eye(5, 2, device=device)
    (new,) = extend_basis([q], [torch.zeros(5, 5, device=device)], 1.0)
    assert (new.added, new.captured, new.total, new.fraction) == (0, 0.0, 0.0, 1.0)
    assert torch.equal(new.q, q)
    assert extend_basis([], [], 0.5) == []


@pytest.mark.parametrize("how", ["as the device wants", "batched"])
def test_layers_do_not_see_each_other(device, how, monkeypatch):
    if how == "batched":
        monkeypatch.setattr(batch, "batched", lambda tensor: True)
    rng = np.random.default_rng(0)
    c = [tensor(moment(d, "power", seed=d)).to(device) for d in (20, 31, 20, 20)]
    q = [tensor(orthonormal(len(m), k, rng)).to(device) for m, k in zip(c, (3, 0, 3, 5), strict=True)]
    thresholds = [0.8, 0.9, 0.99, 0.5]
    together = extend_basis(q, c, thresholds)
    for i, new in enumerate(together):
        (alone,) = extend_basis([q[i]], [c[i]], thresholds[i])
        assert isinstance(alone, Extension)
        assert alone.added == new.added
        torch.testing.assert_close(alone.q.abs(), new.q.abs(), rtol=0, atol=1e-5)
    both = weight_basis([c[0], c[1], c[2], c[3][:7]], [0.5, 0.6, 0.95, 0.7])
    for i, (w, threshold) in enumerate([(c[0], 0.5), (c[1], 0.6), (c[2], 0.95), (c[3][:7], 0.7)]):
        torch.testing.assert_close(both[i].abs(), weight_basis([w], threshold)[0].abs(), rtol=0, atol=1e-4)


def test_same_bits_every_time_and_nothing_changed():
    c, q = tensor(moment(64, "slow", seed=1)), tensor(orthonormal(64, 9, np.random.default_rng(0)))
    before = c.clone(), q.clone()
    first = extend_basis([q], [c], 0.9)[0].q
    torch.manual_seed(99)
    assert torch.equal(extend_basis([q], [c], 0.9)[0].q, first)
    assert torch.equal(weight_basis([c], 0.8)[0], weight_basis([c], 0.8)[0])
    assert torch.equal(c, before[0])
    assert torch.equal(q, before[1])


EYE, NONE = torch.eye(4), torch.zeros(4, 0)
BROKEN = EYE.clone().index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(float("inf")))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: weight_basis([EYE], 1.5), ValueError, r"weight_energy must lie in \[0, 1\], got 1.5"),
        (lambda: weight_basis([EYE], float("nan")), ValueError, "got nan"),
        (lambda: weight_basis([EYE], "0.5"), TypeError, r"weight_energy must be .*got '0\.5'"),
        (lambda: weight_basis([EYE], True), TypeError, r"weight_energy must be .*got True"),
        (lambda: weight_basis([EYE], ["0.5"]), TypeError, r"weight_energy must be .*got '0\.5' at weight_energy\[0\]"),
        (lambda: extend_basis([NONE], [EYE], None), TypeError, "feature_energy must be .*got None"),
        (lambda: weight_basis([EYE], [0.1, 0.2]), ValueError, "got 2 for 1 layers"),
        (lambda: weight_basis([EYE], 0.5, side="left"), ValueError, "got 'left'"),
        (lambda: weight_basis([EYE, BROKEN], 0.5), ValueError, r"w\[1\] must be finite, got inf at \[1, 2\]"),
        (lambda: weight_basis(EYE, 0.5), TypeError, "got a single tensor"),
        (lambda: weight_basis([EYE.long()], 0.5), TypeError, "got torch.int64"),
        (lambda: extend_basis([NONE], [EYE[:3]], 0.5), ValueError, r"c\[0\] must be square, got shape \[3, 4\]"),
        (lambda: extend_basis([NONE], [EYE], -0.1), ValueError, "got -0.1"),
        (lambda: extend_basis([NONE[:3]], [EYE], 0.5), ValueError, r"q\[0\] must have as many rows"),
        (lambda: extend_basis([torch.ones(4, 5)], [EYE], 0.5), ValueError, "at most as many columns"),
        (lambda: extend_basis([NONE, NONE], [EYE], 0.5), ValueError, "got 2 for 1"),
        (lambda: extend_basis([NONE.double()], [EYE], 0.5), TypeError, "got torch.float64"),
        (lambda: extend_basis([NONE], [EYE.half()], 0.5), TypeError, "got torch.float16"),
        (lambda: extend_basis([NONE], [BROKEN], 0.5), ValueError, r"c\[0\] must be finite, got inf"),
        (lambda: extend_basis([EYE * float("nan")], [EYE], 0.5), ValueError, r"q\[0\] must be finite, got nan"),
        (lambda: extend_basis([NONE], [EYE + EYE.roll(1, 0)], 0.5), ValueError, r"c\[0\] must be symmetric"),
        (lambda: extend_basis([NONE], [-EYE], 0.5), ValueError, r"c\[0\] must be positive semidefinite"),
        (lambda: extend_basis([NONE], [EYE + 3 * EYE.flip(0)], 0.5), ValueError, "positive semidefinite"),
        (lambda: extend_basis([2 * EYE], [EYE], 0.5, check_basis=True), ValueError, "must have orthonormal columns"),
    ],
)  # fmt: skip
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("what", ["directions", "extension", "weights"])
def test_host_reads_do_not_grow_with_the_layers_of_a_shape(what, monkeypatch):
    """On a GPU every number that Python reads waits for all that was launched before it."""
    monkeypatch.setattr(batch, "batched", lambda tensor: True)  # as on a GPU
    rng = np.random.default_rng(0)
    reads = 0

    def counted(method):
        def read(*args):
            nonlocal reads
            reads += 1
            return method(*args)

        return read

    for name in ("tolist", "item", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))

    def of(layers):
        nonlocal reads
        c = [tensor(moment(24, "power", seed=i)) for i in range(layers)]
        q = [tensor(orthonormal(24, 4, rng)) for _ in range(layers)]
        reads = 0
        calls = {
            "directions": lambda: top_directions(c, q, 3),
            "extension": lambda: extend_basis(q, c, 0.9),
            "weights": lambda: weight_basis(c, 0.6),
        }
        calls[what]()
        return reads

    assert 0 < of(2) == of(9)
