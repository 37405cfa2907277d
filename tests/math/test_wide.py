"""Products in float64 from portions: what one product in float64 gives, without its copy of the matrix."""

import pytest
import torch

from bench.harness import recorded_bytes
from keeplora.math.wide import wide_gram, wide_image


@pytest.mark.parametrize("shape", [(1, 7, 3), (2, 3, 7), (1, 9, 9), (2, 13, 4), (1, 0, 3), (1, 5, 0)])
def test_portions_add_up(shape):
    f = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(wide_gram(f), f.double().mT @ f.double(), rtol=0, atol=1e-13)
    for m in f:
        v = torch.randn(len(m), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(wide_image(m, v), (m.double().T @ v).float(), rtol=0, atol=1e-6)


def test_no_copy_of_a_long_matrix_is_made():
    f = torch.randn(1, 4000, 50)
    peak, _ = recorded_bytes(wide_gram, f)
    assert peak < 8 * 50 * (50 + 50) + 4096  # the sum and one portion
    peak, _ = recorded_bytes(wide_image, f[0].T, torch.randn(50, 50, dtype=torch.float64))
    assert peak < 4 * 4000 * 50 * 2 + 8 * 50 * 50 * 2 + 4096  # the result, in parts and joined
