"""Sketched second moments: lower bounds, near the optimum, and what they add to a basis."""

import numpy as np
import pytest
import torch

from keeplora.math.lowrank import extend_basis
from keeplora.math.moment import SketchedMoment, extend_sketched, nystrom
from keeplora.math.sketch import gaussian
from tests.math.spectra import f64, off_identity, orthonormal, tensor

D = 160


def moment(power, seed=0):
    rng = np.random.default_rng(seed)
    frame = orthonormal(D, D, rng)
    return frame * (np.arange(1, D + 1) ** -power) @ frame.T


def sketch(c, width, dtype=torch.float32):
    omega = gaussian(D, width, 0, torch.empty(0, dtype=dtype))
    return nystrom(tensor(c, dtype) @ omega, omega, float(np.trace(c)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("width", [1, 20, 80, D])
def test_never_more_than_the_moment_and_near_its_best_part(power, width, dtype):
    c = moment(power)
    found = sketch(c, width, dtype)
    assert found.factor.shape == (D, width)
    approximation = f64(found.factor) @ f64(found.factor).T
    omega = f64(gaussian(D, width, 0, torch.empty(0, dtype=dtype)))
    rounding = 4 * torch.finfo(dtype).eps * np.linalg.norm(c @ omega, 2) * np.linalg.cond(omega)
    assert np.linalg.eigvalsh(c - approximation).min() >= -rounding
    # Nystrom of width w is within a factor 1 + r / (w - r - 1) of the best rank r in trace norm, on average.
    r = max(1, width // 4)
    best = np.sort(np.linalg.eigvalsh(c))[: D - r].sum()
    if width > 8:
        assert np.trace(c - approximation) <= 1.5 * (1 + r / (width - r - 1)) * best + D * rounding


def test_zero_and_rank_deficient_moments():
    assert (sketch(np.zeros((D, D)), 10).factor == 0).all()
    frame = orthonormal(D, 5, np.random.default_rng(1))
    c = frame @ np.diag([5.0, 4, 3, 2, 1]) @ frame.T
    found = sketch(c, 12)
    assert np.linalg.norm(f64(found.factor) @ f64(found.factor).T - c) <= 1e-4 * np.linalg.norm(c)


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("k", [0, 3, 30])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_extension_reaches_the_threshold_in_truth(power, k, threshold):
    c, q = moment(power), tensor(orthonormal(D, k, np.random.default_rng(2)))
    (new,) = extend_sketched([q], [sketch(c, 120)], threshold)
    (exact,) = extend_basis([q], [tensor(c)], threshold)
    basis = f64(new.q)
    truth = np.trace(basis.T @ c @ basis) / np.trace(c)
    assert truth >= threshold - 1e-5
    assert new.fraction <= truth + 1e-5  # it claims no more than is there
    assert torch.equal(new.q[:, :k], q)
    assert off_identity(new.q) <= 5e-6
    assert exact.added <= new.added + 1
    assert new.added <= 1.3 * exact.added + 2


def test_a_sketch_that_is_too_narrow_gives_all_it_has():
    c = moment(0.5)
    (new,) = extend_sketched([torch.zeros(D, 0)], [sketch(c, 6)], 0.99)
    assert new.added == 6
    assert new.fraction < 0.99


def test_nothing_to_add():
    q = torch.eye(D)[:, :4]
    inside = np.zeros((D, D))
    inside[:4, :4] = np.eye(4)
    for found in extend_sketched(
        [q, q, torch.eye(D)], [sketch(inside, 8), sketch(np.zeros((D, D)), 8), sketch(moment(1.0), 8)], 0.9
    ):
        assert found.added == 0


def test_refuses():
    good = SketchedMoment(torch.ones(4, 2).double(), 8.0)
    with pytest.raises(ValueError, match=r"moments\[0\] must have as many rows as q\[0\], got \[4, 2\] for \[3, 1\]"):
        extend_sketched([torch.eye(3)[:, :1]], [good], 0.5)
    with pytest.raises(ValueError, match="moments must"):
        extend_sketched([torch.eye(4)[:, :1]], [], 0.5)
    with pytest.raises(ValueError, match=r"feature_energy must lie in .*got 1\.5"):
        extend_sketched([torch.eye(4)[:, :1]], [good], 1.5)
    with pytest.raises(ValueError, match=r"y must .*got \[4, 2\] for \[4, 3\]"):
        nystrom(torch.ones(4, 2), torch.ones(4, 3), 1.0)
    with pytest.raises(TypeError, match="all matrices or all sketches, got 1 of 2 sketched"):
        extend_basis([torch.eye(4)[:, :1]] * 2, [good, torch.eye(4)], 0.5)
