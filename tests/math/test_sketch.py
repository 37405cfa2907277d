from dataclasses import replace

import numpy as np
import pytest
import torch

from keeplora.math import factorise
from keeplora.math.factorise import CPU
from keeplora.math.lowrank import extend_basis, weight_basis
from keeplora.math.sketch import gaussian, leading_eigenvectors, row_space
from tests.math.spectra import away_from_ties, f64, off_identity, orthonormal, smallest_rank, tensor

ENERGIES = {
    "power": lambda i: i**-2.0,
    "slow": lambda i: i**-1.0,
    "root": lambda i: i**-0.5,
    "exponential": lambda i: np.exp(-i / 30),
    "clustered": lambda i: np.where(i <= 40, 1.0, 0.01),
    "flat": np.ones_like,
}


def moment(d, name, rng):
    frame = orthonormal(d, d, rng)
    c = (frame * ENERGIES[name](np.arange(1, d + 1, dtype=np.float64))) @ frame.T
    return tensor((c + c.T) / 2)


@pytest.mark.parametrize("name", ENERGIES)
def test_certified_rank_is_the_exact_one(name):
    rng = np.random.default_rng(0)
    d = 600
    c, q = moment(d, name, rng), tensor(orthonormal(d, 20, rng))
    p = np.eye(d) - f64(q) @ f64(q).T
    energies = np.clip(np.linalg.eigvalsh(p @ f64(c) @ p)[::-1], 0, None)
    total, held = float(np.trace(f64(c))), float(np.trace(f64(q).T @ f64(c) @ f64(q)))
    certified = 0
    # The fine ones end just inside the first block, where Ritz values converge last.
    for threshold in (0.1004, 0.3004, 0.6004, 0.8504, 0.9704, *np.arange(0.3304, 0.42, 0.01)):
        pairs = leading_eigenvectors(c, q, total=total, share=threshold, captured=held, floor=1e-8 * total, seed=0)
        if pairs is None:
            continue
        certified += 1
        v, theta = pairs
        assert away_from_ties(energies, total, threshold, held)
        assert v.shape == (d, smallest_rank(energies, total, threshold, held))
        assert off_identity(torch.cat([q, v], 1)) <= 5e-6
        captured = np.trace(f64(v).T @ f64(c) @ f64(v))
        assert theta.sum().item() == pytest.approx(captured, abs=1e-6 * total)
        assert held + captured >= (threshold - 1e-5) * total
    assert certified >= {"power": 5, "exponential": 4, "clustered": 2, "slow": 2, "root": 3, "flat": 1}[name]


def test_flat_spectra_are_left_to_the_exact_path():
    c = moment(400, "flat", np.random.default_rng(0))
    assert leading_eigenvectors(c, c[:, :0], total=400.0, share=0.9, captured=0.0, floor=1e-6, seed=0) is None


@pytest.mark.parametrize("threshold", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", ["power", "slow"])
def test_large_matrices_get_the_same_bases(name, threshold, monkeypatch):
    rng = np.random.default_rng(1)
    c, q = moment(500, name, rng), tensor(orthonormal(500, 11, rng))
    wide = tensor(orthonormal(700, 500, rng)) @ torch.linalg.cholesky(c.double()).T.float()

    def results():
        new = extend_basis([q], [c], threshold)[0]
        return new, *weight_basis([wide, wide.T.contiguous()], threshold)

    exact = results()
    monkeypatch.setattr(factorise, "plan_for", lambda device: replace(CPU, iterative_from=100))
    found = results()
    assert found[0].added == exact[0].added
    assert found[0].captured == pytest.approx(exact[0].captured, rel=1e-4)
    assert found[0].fraction >= threshold - 1e-5
    assert torch.equal(found[0].q[:, :11], q)
    for a, b in zip([found[0].q, *found[1:]], [exact[0].q, *exact[1:]], strict=True):
        assert a.shape == b.shape
        assert off_identity(a) <= 5e-6


def test_twenty_iterative_extensions_keep_the_basis_orthonormal(monkeypatch):
    monkeypatch.setattr(factorise, "plan_for", lambda device: replace(CPU, iterative_from=100))
    d, rng = 400, np.random.default_rng(0)
    q = torch.zeros(d, 0)
    for _ in range(20):
        c = moment(d, "power", rng)
        (new,) = extend_basis([q], [c], 0.9)
        assert torch.equal(new.q[:, : q.shape[1]], q)
        q = new.q
    assert 60 <= q.shape[1] < 300
    assert off_identity(q) <= 5e-6


def test_row_space_is_orthonormal_and_apart_from_the_basis(device):
    rng = np.random.default_rng(2)
    g = torch.randn(2, 50, 60, device=device)
    q = [tensor(orthonormal(60, k, rng)).to(device) for k in (7, 0)]
    v, image, spectrum = row_space(g, q, 4, steps=2, seed=3)
    assert v.shape == (2, 60, 12)
    for i in range(2):
        assert off_identity(torch.cat([q[i], v[i]], 1).cpu()) <= 5e-6
    torch.testing.assert_close(image, g @ v)
    squares = (image.double() @ spectrum.vectors).square().sum(1)
    torch.testing.assert_close(squares, torch.linalg.svdvals(image.double()).square(), rtol=1e-9, atol=1e-9)


def test_probe_has_its_own_generator():
    like = torch.empty(0)
    first = gaussian(5, 4, 1, like)
    torch.manual_seed(7)
    assert torch.equal(gaussian(5, 4, 1, like), first)
    assert not torch.equal(gaussian(5, 4, 2, like), first)
    assert gaussian(2, 2, 0, like.double()).dtype == torch.float64
