"""Errors over seeds and items, and the paired test: against closed forms, scipy's t-test and a simulation."""

import math
from fractions import Fraction
from statistics import variance

import numpy as np
import pytest
from made_records import record_of
from scipy.stats import ttest_rel

from keeplora.report.metrics import continual_metrics
from keeplora.report.paired import compare, figure, item_values
from keeplora.train.items import packed, unpacked


@pytest.mark.parametrize("items", [1, 7, 8, 9, 200])
def test_packed_items_come_back(items):
    right = np.random.default_rng(items).random(items) < 0.5
    assert np.array_equal(unpacked(packed(right), items), right)
    for wrong in (items + 8, items - 8):
        with pytest.raises(ValueError, match=f"{wrong} items"):
            unpacked(packed(right), wrong)
    with pytest.raises(ValueError, match="base64"):
        unpacked("§", items)


def test_set_bits_beyond_the_items_are_damage():
    with pytest.raises(ValueError, match="3 items"):
        unpacked(packed([True] * 4), 3)


def test_means_of_item_values_are_the_matrix_metrics():
    """Tasks of different sizes weigh the same, as in the matrix."""
    draws = np.random.default_rng(0)
    right = [[draws.random(n) < 0.6 for n in (5, 9, 16)] for _ in range(3)]
    record = record_of(right)
    assert record.problem() == ""
    metrics = continual_metrics(100 * np.array(record.accuracy)).as_dict()
    for name, values in item_values(record).items():
        assert figure([values]).mean == pytest.approx(metrics[name], rel=1e-12), name
    unseen = item_values(record)["transfer"]
    assert [len(one) for one in unseen] == [9, 16]
    assert unseen[1][3] == 50.0 * (int(right[0][2][3]) + int(right[1][2][3]))


def test_one_task_has_no_transfer():
    assert set(item_values(record_of([[np.array([True, False])]]))) == {"avg", "last"}


def by_hand(runs):
    """Mean, error² and Satterthwaite's degrees of freedom in rational numbers, from the definitions."""
    seeds, tasks = len(runs), len(runs[0])
    runs = [[[Fraction(v) for v in one] for one in values] for values in runs]
    figures = [sum(sum(one) / len(one) for one in values) / tasks for values in runs]
    parts = [(variance(figures) / seeds, seeds - 1)] if seeds > 1 else []
    for j in range(tasks):
        means = [sum(values[j][k] for values in runs) / seeds for k in range(len(runs[0][j]))]
        parts.append((variance(means) / len(means) / tasks**2, len(means) - 1))
    total = sum(part for part, _ in parts)
    return sum(figures) / seeds, total, total**2 / sum(part**2 / dof for part, dof in parts)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_error_counts_seeds_and_items_of_every_task(seeds):
    draws = np.random.default_rng(seeds)
    runs = [[draws.integers(0, 2, n) + s for n in (4, 6, 11)] for s in range(seeds)]
    mean, error, dof = figure([[one.astype(float) for one in values] for values in runs])
    expected = by_hand([[one.tolist() for one in values] for values in runs])
    assert (mean, error**2, dof) == pytest.approx([float(value) for value in expected])


def test_p_in_closed_form_where_only_the_seeds_differ():
    """Two seeds, differences 1 and 3 on every item: mean 2, error 1, one degree of freedom: Cauchy's distribution."""
    ours, theirs = [[np.full(5, 2.0)], [np.full(5, 5.0)]], [[np.full(5, 1.0)], [np.full(5, 2.0)]]
    mean, error, p = compare(ours, theirs)
    assert (mean, error) == (2.0, 1.0)
    assert p == pytest.approx(1 - 2 / math.pi * math.atan(2.0))
    third = compare([*ours, [np.full(5, 4.0)]], [*theirs, [np.full(5, 2.0)]])  # 1, 3, 2: t = 2√3 with 2
    t = 2 * math.sqrt(3)
    assert third.p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_with_one_seed_and_task_it_is_the_paired_t_test():
    draws = np.random.default_rng(5)
    ours, theirs = ((draws.random(40) < share).astype(float) for share in (0.8, 0.5))
    assert compare([[ours]], [[theirs]]).p == pytest.approx(ttest_rel(ours, theirs).pvalue)


def test_pairing_takes_out_what_items_share():
    """The same items are hard for both: the difference is far more certain than either figure."""
    hard = np.tile([0.0, 100.0], 50)
    theirs = [[hard.copy()]]
    ours = [[np.where(np.arange(100) % 20 == 0, 100.0, hard)]]
    assert compare(ours, theirs).error < 0.5 * figure(ours).error
    assert compare(ours, theirs).p < 0.05 < compare([[ours[0][0][::-1]]], theirs).p


@pytest.mark.parametrize(("shift", "p"), [(0.0, 1.0), (1.0, 0.0)])
def test_without_any_spread_the_answer_is_plain(shift, p):
    values = [[np.array([1.0, 2.0])]]
    assert compare([[values[0][0] + shift]], values) == (shift, 0.0, p)


def test_other_seeds_or_items_are_refused():
    two, three = [[np.zeros(2)]], [[np.zeros(3)]]
    for ours in (three, two * 2, [[np.zeros(2)] * 2]):
        with pytest.raises(ValueError, match="same seeds and items"):
            compare(ours, two)


def test_equal_methods_are_rarely_called_different():
    """Of two methods with nothing but noise of seeds, items and both between them, at most one in twenty."""
    draws, tries = np.random.default_rng(1), 600
    hits = 0
    for _ in range(tries):
        items = [draws.normal(0, 3, n) for n in (30, 60)]
        runs = [[one + draws.normal(0, 0.5) + draws.normal(0, 2, len(one)) for one in items] for _ in range(3)]
        hits += compare(runs, [[np.zeros(len(one)) for one in items]] * 3).p < 0.05
    assert 0.01 < hits / tries < 0.065
