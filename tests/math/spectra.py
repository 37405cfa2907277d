"""Matrices with known spectra, and the answers from the definitions in float64 NumPy; no library code is used."""

import numpy as np
import torch

SPECTRA = {
    "flat": lambda i: np.ones_like(i),
    "slow": lambda i: i**-0.3,
    "power": lambda i: i**-1.0,
    "deficient": lambda i: np.where(i <= 10, i**-0.5, 0.0),
    "clustered": lambda i: np.where(i <= len(i) // 4, 1.0, 0.1),
}


def orthonormal(d, k, rng):
    return np.linalg.qr(rng.standard_normal((d, k)))[0]


def matrix(rows, cols, spectrum, rng):
    """``[rows, cols]`` float64 with the singular values of ``SPECTRA[spectrum]``."""
    n = min(rows, cols)
    sigma = SPECTRA[spectrum](np.arange(1, n + 1, dtype=np.float64))
    return (orthonormal(rows, n, rng) * sigma) @ orthonormal(cols, n, rng).T


def tensor(array, dtype=torch.float32):
    return torch.tensor(array, dtype=dtype)


def f64(t):
    return t.detach().double().numpy()


def smallest_rank(energies, total, threshold, captured=0.0, tie=0.0):
    """By counting up; ``tie`` is the energy by which a target may be missed."""
    count = 0
    while captured < threshold * total - tie and count < len(energies):
        captured += energies[count]
        count += 1
    return count


def away_from_ties(energies, total, threshold, captured=0.0, margin=1e-6):
    """Whether no number of directions comes within ``margin`` of the target."""
    sums = captured + np.concatenate([[0.0], np.cumsum(energies)])
    return np.abs(sums - threshold * total).min() > margin * total


def off_identity(q):
    q = f64(q)
    return np.abs(q.T @ q - np.eye(q.shape[1])).max(initial=0.0)


def sine(found, wanted):
    """Sine of the largest angle from the columns of ``found`` to the span of the orthonormal ``wanted``."""
    return np.linalg.norm(found - wanted @ (wanted.T @ found), 2) if found.size else 0.0
