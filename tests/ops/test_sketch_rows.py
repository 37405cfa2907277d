import pytest
import torch
from close import assert_rounded

from keeplora.ops import random_signs, sketch_rows

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def mix(h):
    """MurmurHash3's finalizer on Python integers."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ (h >> 16)


def sign(seed, i, j):
    """Entry (i, j) from the documented rule, one number at a time."""
    state = mix(mix(seed & 0xFFFFFFFF) ^ (seed >> 32))
    return 1 - 2 * (mix(mix(state ^ i) ^ (j // 32)) >> (j % 32) & 1)


def exact(x, delta, width, seed):
    psi = torch.tensor([[sign(seed, i, j) for j in range(delta.shape[1])] for i in range(width)], dtype=torch.float64)
    return psi.reshape(width, -1) @ delta.cpu().double().T @ x.cpu().double() / width**0.5


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 5, 3), (1, 1, 1, 1), (37, 31, 70, 16), (90, 8, 33, 5)], ids=str)
def test_matches_float64(device, dtype, shape):
    tokens, d_in, d_out, width = shape
    x, delta = (torch.randn(tokens, d, device=device).to(dtype) for d in (d_in, d_out))
    z = sketch_rows(x, delta, width=width, seed=2**40 + 7)
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # A sum over outputs inside one over tokens: their rounding errors add.
    assert_rounded(z, exact(x, delta, width, 2**40 + 7), terms=tokens + d_out, what="z")


def test_accumulates_over_batches(device):
    batches = [(torch.randn(n, 5, device=device), torch.randn(n, 40, device=device)) for n in (4, 9)]
    z = sketch_rows(*batches[0], width=6, seed=3)
    assert sketch_rows(*batches[1], width=6, seed=3, out=z) is z
    x, delta = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert_rounded(z, exact(x, delta, 6, 3), terms=53, what="z")


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1])
def test_signs_follow_the_documented_hash(device, seed):
    expected = torch.tensor([[sign(seed, i, j) for j in range(67)] for i in range(5)], dtype=torch.float32)
    assert torch.equal(random_signs(5, 67, seed=seed, device=device).cpu(), expected)


def test_signs_are_balanced_and_rows_independent():
    psi = random_signs(64, 4096, seed=5, dtype=torch.float64)
    # Means and inner products of n fair signs are within 5/sqrt(n) of 0 but for one case in 1e6.
    assert psi.mean().abs() < 5 / psi.numel() ** 0.5
    products = psi @ psi.T / 4096 - torch.eye(64, dtype=torch.float64)
    assert products.abs().max() < 5.5 / 4096**0.5
    columns = psi.T @ psi / 64 - torch.eye(4096, dtype=torch.float64)
    assert columns.square().mean() == pytest.approx(1 / 64, rel=0.05)
    assert not torch.equal(psi, random_signs(64, 4096, seed=6, dtype=torch.float64))


def test_sketch_keeps_the_rows_lengths():
    """E[ZᵀZ] = GᵀG: the sketch has the gradient's energy, to the accuracy of its width."""
    x, delta = torch.randn(50, 12), torch.randn(50, 600)
    gradient = delta.double().T @ x.double()
    z = sketch_rows(x, delta, width=512, seed=1).double()
    assert (z.norm() / gradient.norm()).item() == pytest.approx(1, abs=4 * (2 / 512) ** 0.5 / 2)


def test_compiles_in_one_graph(device):
    x, delta = torch.randn(7, 5, device=device), torch.randn(7, 40, device=device)
    call = torch.compile(lambda x, delta: sketch_rows(x, delta, width=3, seed=9), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(x, delta), sketch_rows(x, delta, width=3, seed=9))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 0}, ValueError, r"width must be at least 1, got 0"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*63\), got -1"),
        ({"delta": torch.ones(3, 5)}, ValueError, r"delta must have the tokens and the device of x"),
        ({"out": torch.ones(2, 5)}, ValueError, r"out must be contiguous \[2, 4\] on cpu, got shape \[2, 5\]"),
        ({"out": torch.ones(2, 4).half()}, TypeError, r"out must be one of float32, got torch.float16"),
    ],
)
def test_refuses_and_changes_nothing(options, error, message):
    arguments = {"delta": torch.ones(2, 5), "width": 2, "seed": 0, "out": torch.ones(2, 4)} | options
    before = arguments["out"].clone()
    with pytest.raises(error, match=message):
        sketch_rows(torch.ones(2, 4), **arguments)
    assert torch.equal(arguments["out"], before)
