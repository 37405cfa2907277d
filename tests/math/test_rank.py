import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keeplora.math.rank import fewest_directions, fewest_directions_each
from tests.math.spectra import away_from_ties, smallest_rank

numbers = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(numbers, st.floats(0, 1), st.floats(0, 2e3), st.floats(0, 2e3))
def test_is_the_fewest_that_reaches(energies, threshold, captured, unknown):
    energies = np.sort(np.array(energies))[::-1].copy()
    total = captured + energies.sum() + unknown
    got = fewest_directions(torch.tensor(energies), total, threshold, captured=captured)
    if away_from_ties(energies, total, threshold, captured, margin=1e-9):
        assert got == smallest_rank(energies, total, threshold, captured)


@settings(max_examples=100, deadline=None)
@given(numbers, st.floats(0, 1), st.floats(0, 1))
def test_grows_with_the_threshold(energies, one, other):
    energies = torch.tensor(sorted(energies, reverse=True))
    low, high = sorted([one, other])
    total = float(energies.double().sum())
    assert fewest_directions(energies, total, low) <= fewest_directions(energies, total, high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 3, 7, 10, 49, 384])
def test_exact_ties_go_to_the_fewer(dtype, n):
    # j/n is not representable, and n sums of 1/n miss it by rounding: still j directions, never j + 1.
    energies = torch.full((n,), 1 / n, dtype=dtype)
    total = float(energies.double().sum())
    assert [fewest_directions(energies, total, j / n) for j in range(n + 1)] == list(range(n + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_never_a_direction(dtype):
    eps = torch.finfo(dtype).eps
    energies = torch.cat([torch.tensor([4.0, 2.0, 1.0]), torch.full((500,), eps * 5)]).to(dtype)
    assert fewest_directions(energies, float(energies.double().sum()), 1.0) == 3


def test_a_target_out_of_reach_takes_all_significant_directions():
    assert fewest_directions(torch.tensor([3.0, 1.0]), 100.0, 0.5) == 2


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_no_energy_wants_no_direction(threshold):
    assert fewest_directions(torch.zeros(5), 0.0, threshold) == 0
    assert fewest_directions(torch.zeros(0), 0.0, threshold) == 0


def test_zero_threshold_wants_nothing_and_captured_energy_counts():
    energies = torch.tensor([5.0, 4.0])
    assert fewest_directions(energies, 10.0, 0.0) == 0
    assert fewest_directions(energies, 10.0, 0.1, captured=1.0) == 0
    assert fewest_directions(energies, torch.tensor(10.0), 0.6, captured=1.0) == 1


def test_explicit_rounding_level_counts_as_reached():
    energies = torch.tensor([6.0, 3.0, 0.5, 0.5])
    assert fewest_directions(energies, 10.0, 0.95, floor=0.0) == 3
    assert fewest_directions(energies, 10.0, 0.95, floor=0.5) == 2
    assert fewest_directions(energies, 10.0, 1.0, floor=0.6) == 2


def test_many_layers_agree_with_one(device):
    rng = np.random.default_rng(3)
    energies = np.sort(rng.random((6, 11)), axis=1)[:, ::-1].copy()
    energies[2, 5:] = 0
    total, captured = energies.sum(1) + 0.5, np.full(6, 0.5)
    thresholds = [0.0, 0.3, 0.9, 1.0, 0.05, 0.7]
    counts, reached = fewest_directions_each(
        torch.tensor(energies, device=device), torch.tensor(total, device=device), thresholds,
        captured=torch.tensor(captured, device=device),
    )  # fmt: skip
    assert counts.tolist() == [
        smallest_rank(e, t, h, 0.5, tie=1e-15 * t) for e, t, h in zip(energies, total, thresholds, strict=True)
    ]
    assert reached.all()
    short = fewest_directions_each(torch.tensor(energies[:, :2]), torch.tensor(total), [0.99] * 6)[1]
    assert not short.any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 2), 1.0, 0.5), ValueError, r"energies must be \[n\], got shape \[2, 2\]"),
        ((torch.ones(2, dtype=torch.int64), 1.0, 0.5), TypeError, "got torch.int64"),
        ((torch.ones(2), 2.0, 1.01), ValueError, r"share must lie in \[0, 1\], got 1.01"),
        ((torch.ones(2), 2.0, float("nan")), ValueError, r"share must lie in \[0, 1\], got nan"),
        ((torch.ones(2), -1.0, 0.5), ValueError, "total must be finite and >= 0, got -1.0"),
        ((torch.ones(2), float("inf"), 0.5), ValueError, "total must be finite"),
        ((torch.tensor([1.0, -0.5]), 2.0, 0.5), ValueError, "got -0.5 at 1"),
        ((torch.tensor([1.0, float("nan")]), 2.0, 0.5), ValueError, "got nan at 1"),
        ((torch.tensor([1.0, 2.0]), 3.0, 0.5), ValueError, "descending, got 1.0 before 2.0 at 0"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        fewest_directions(*arguments)
