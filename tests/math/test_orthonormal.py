import numpy as np
import pytest
import torch

from keeplora.math.orthonormal import complement, reorthogonalize
from tests.math.spectra import f64, off_identity, orthonormal, sine, tensor

ALLOWED = {torch.float32: 5e-6, torch.float64: 1e-14}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "k", "new"), [(7, 2, 3), (64, 0, 64), (65, 33, 32), (129, 100, 5), (5, 5, 2), (4, 1, 0)])
def test_new_columns_complete_the_basis(d, k, new, dtype):
    rng = np.random.default_rng(d + k)
    q = tensor(orthonormal(d, k, rng), dtype)
    y = tensor(rng.standard_normal((d, new)), dtype)
    (z,) = reorthogonalize([y], [q])
    assert z.shape == (d, min(new, d - k))
    assert off_identity(torch.cat([q, z], 1)) <= ALLOWED[dtype]
    if new <= d - k:
        both = np.linalg.qr(np.concatenate([f64(q), f64(y)], 1))[0]
        assert sine(f64(z), both) <= 100 * torch.finfo(dtype).eps


def test_dependent_columns_are_cut_off():
    y = torch.randn(9, 2)
    q = torch.linalg.qr(torch.randn(9, 3)).Q
    (one, two) = reorthogonalize([y[:, [0, 0, 1]], q @ torch.randn(3, 4)], [q, q])
    assert (one.shape, two.shape) == ((9, 2), (9, 0))


@pytest.mark.parametrize(("d", "k"), [(1, 0), (6, 6), (6, 1), (97, 40)])
def test_complement_is_the_rest_of_the_space(d, k):
    q = tensor(orthonormal(d, k, np.random.default_rng(d)), torch.float64)
    free = complement(q)
    assert free.shape == (d, d - k)
    frame = np.concatenate([f64(q), f64(free)], 1)
    assert np.abs(frame.T @ frame - np.eye(d)).max() <= 1e-13
    torch.testing.assert_close(complement(torch.stack([q, q]))[1], free, rtol=0, atol=1e-14)
