import numpy as np
import pytest
import torch
from precision import FASTER

from keeplora.math.subspace import Certificate, certificate, certificates, orthogonality, project
from tests.math.spectra import f64, orthonormal, tensor

EPS32 = 2.0**-23


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "d", "k"), [(3, 5, 2), (1, 1, 0), (4, 7, 7), (17, 129, 64), (0, 5, 2)])
def test_project_matches_the_definition(rows, d, k, dtype):
    rng = np.random.default_rng(d)
    x, q = tensor(rng.standard_normal((rows, d)), dtype), tensor(orthonormal(d, k, rng), dtype)
    exact = f64(x) - f64(x) @ f64(q) @ f64(q).T
    got = project(x, q)
    assert got.dtype == dtype
    # Two products of d and k terms, entries at most ‖row‖.
    allowed = (d**0.5 + k**0.5 + 4) * torch.finfo(dtype).eps * np.linalg.norm(f64(x), axis=1, keepdims=True)
    assert (np.abs(f64(got) - exact) <= allowed).all()
    assert project(x, q) is not x


def test_project_takes_batches_and_vectors():
    rng = np.random.default_rng(0)
    q = tensor(orthonormal(6, 2, rng), torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(project(x, q)[1, 2], project(x[1, 2], q))
    torch.testing.assert_close(project(x, torch.stack([q, q])), project(x, q))


@pytest.mark.parametrize("shape", [(4, 9, 96), (6, 96), (96,)], ids=str)
@pytest.mark.parametrize("faster", FASTER.values(), ids=FASTER.keys())
def test_the_gradient_of_a_projection_stays_outside_too(faster, shape):
    """Asked for inside of what the caller has switched on, as where a whole loop stands in autocast."""
    q = torch.linalg.qr(torch.randn(96, 40, dtype=torch.float64)).Q
    x, weights = torch.randn(shape), torch.randn(shape)

    def gradients(dtype):
        leaves = [x.to(dtype).requires_grad_(), q.to(dtype).requires_grad_()]
        return torch.autograd.grad((project(*leaves) * weights.to(dtype)).sum(), leaves)

    exact = gradients(torch.float64)
    with faster():
        got = gradients(torch.float32)
    for one, other in zip(got, exact, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).abs().max() <= 40 * EPS32 * other.abs().max()
    assert ((got[0].double() @ q).norm() / got[0].norm()) < 1e-6


def test_a_batch_of_bases_has_gradients():
    x, q = torch.randn(3, 5, 8, requires_grad=True), torch.linalg.qr(torch.randn(3, 8, 2)).Q
    project(x, q).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 5, 8) - torch.ones(3, 5, 8) @ q @ q.mT)


def test_project_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"got shapes \[2, 3\] and \[4, 1\]"):
        project(torch.zeros(2, 3), torch.zeros(4, 1))


def test_orthogonality_is_the_largest_entry():
    q = torch.eye(4)[:, :3].clone()
    assert orthogonality(q) == 0.0
    q[3, 1] = 0.25
    assert orthogonality(q) == 0.25**2
    q[3, 2] = -0.5
    assert orthogonality(q) == 0.25
    assert orthogonality(torch.zeros(4, 0)) == 0.0


def layer(out, d, r, k, seed, leak=0.0):
    rng = np.random.default_rng(seed)
    frame = orthonormal(d, k + r, rng)
    a = frame[:, k:].T + leak * (frame[:, :r].T if k >= r else 0.0)
    return tensor(a), tensor(rng.standard_normal((out, r))), tensor(frame[:, :k])


@pytest.mark.parametrize("leak", [0.0, 1e-5, 0.3])
@pytest.mark.parametrize(("out", "d", "r", "k"), [(9, 33, 4, 8), (3, 20, 8, 8), (64, 16, 1, 15)])
def test_leak_is_that_of_the_product(out, d, r, k, leak):
    a, b, q = layer(out, d, r, k, seed=out, leak=leak)
    change = f64(b) @ f64(a)
    exact = np.linalg.norm(change @ f64(q)) / np.linalg.norm(change)
    found = certificate(a, b, q)
    assert found.leak == pytest.approx(exact, rel=1e-6, abs=1e-14)
    assert found.leak_after_rounding is None
    assert found.captured is None
    assert (found.rank, found.free) == (k, d - k)
    assert isinstance(found, Certificate)
    assert all(isinstance(v, float | int | None) for v in vars(found).values())


def test_leak_of_ill_conditioned_factors():
    a, b, q = layer(20, 40, 6, 10, seed=1, leak=1e-3)
    b = b * torch.logspace(0, -6, 6)
    change = f64(b) @ f64(a)
    assert certificate(a, b, q).leak == pytest.approx(
        np.linalg.norm(change @ f64(q)) / np.linalg.norm(change), rel=1e-9
    )


def test_rounded_merge_leaks_and_says_so():
    a, b, q = layer(50, 60, 4, 30, seed=2)
    w = torch.randn(50, 60)
    merged = (w.double() + b.double() @ a.double()).bfloat16()
    delta = merged.double() - w.double()
    found = certificate(a, b, q, delta=delta, captured=0.5)
    exact = np.linalg.norm(delta.numpy() @ f64(q)) / np.linalg.norm(delta.numpy())
    assert found.leak_after_rounding == pytest.approx(exact, rel=1e-9)
    assert found.leak < 1e-6 < 1e-4 < found.leak_after_rounding
    assert found.captured == 0.5


def test_many_layers_with_their_extended_bases():
    first, second = layer(5, 12, 2, 3, seed=3), layer(7, 30, 4, 0, seed=4)
    wider = torch.linalg.qr(torch.cat([first[2], torch.randn(12, 4)], 1)).Q
    found = certificates(
        [first[0], second[0]],
        [first[1], second[1]],
        [first[2], second[2]],
        basis=[wider, second[2]],
        captured=[0.9, 1.0],
    )
    assert [c.rank for c in found] == [7, 0]
    assert [c.free for c in found] == [5, 30]
    assert found[0].leak == certificate(*first).leak
    assert found[0].orthogonality == orthogonality(wider)
    assert found[1].leak == 0.0
    assert certificates([], [], []) == []


def test_no_change_leaks_nothing():
    a, b, q = layer(5, 12, 2, 3, seed=5)
    found = certificate(a, torch.zeros_like(b), q, delta=torch.zeros(5, 12))
    assert (found.leak, found.leak_after_rounding) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"b": [torch.zeros(3, 3)]}, ValueError, r"b\[0\] must have one column per row of a\[0\]"),
        ({"b": []}, ValueError, "got 0 for 1"),
        ({"q": [torch.zeros(5, 1)]}, ValueError, r"q\[0\] must have as many rows as a\[0\] has columns"),
        ({"q": [torch.zeros(4, 5)]}, ValueError, "at most as many columns as rows"),
        ({"q": [torch.zeros(4, 1).double()]}, TypeError, "got torch.float64"),
        ({"delta": [torch.zeros(4, 4)]}, ValueError, r"delta\[0\] must be \[3, 4\]"),
        ({"captured": [0.1, 0.2]}, ValueError, "got 2 for 1"),
        ({"a": torch.zeros(2, 4)}, TypeError, "got a single tensor"),
    ],
)
def test_refuses(change, error, message):
    good = {"a": [torch.zeros(2, 4)], "b": [torch.zeros(3, 2)], "q": [torch.zeros(4, 1)]}
    with pytest.raises(error, match=message):
        certificates(**{**good, **change})
