"""Metrics against values worked out by hand from the definitions."""

import pytest

from keeplora.report.metrics import continual_metrics, mean_std

# rows: after task 0, 1, 2; columns: task 0, 1, 2
ACCURACY = [[90.0, 40.0, 20.0], [70.0, 80.0, 26.0], [60.0, 84.0, 95.0]]


def test_metrics_by_hand():
    metrics = continual_metrics(ACCURACY)
    assert metrics.transfer == pytest.approx((40.0 + (20.0 + 26.0) / 2) / 2, abs=1e-12)  # 31.5
    assert metrics.avg == pytest.approx(565.0 / 9, abs=1e-12)
    assert metrics.last == pytest.approx((60.0 + 84.0 + 95.0) / 3, abs=1e-12)
    # task 0 falls from 90 to 60; task 1 is best at the end, so it lost nothing
    assert metrics.forgetting == pytest.approx((30.0 + 0.0) / 2, abs=1e-12)
    assert metrics.learn == pytest.approx((90.0 + 80.0 + 95.0) / 3, abs=1e-12)


def test_forgetting_counts_from_the_best_accuracy_even_before_learning():
    # task 0 is best after task 1 (95), not right after it was learned (50)
    assert continual_metrics([[50.0, 0.0], [95.0, 0.0]]).forgetting == 0.0
    assert continual_metrics([[95.0, 0.0], [50.0, 0.0]]).forgetting == 45.0


def test_transfer_weighs_tasks_equally_not_entries():
    # task 1 has one entry before it is learned, task 2 has two: (10 + 40) / 2, not (10 + 30 + 50) / 3
    assert continual_metrics([[0, 10, 30], [0, 0, 50], [0, 0, 0]]).transfer == 25.0


def test_a_model_that_never_changes_scores_its_zero_shot():
    row = [45.0, 60.0, 15.0, 80.0]
    metrics = continual_metrics([row] * 4)
    assert metrics.avg == metrics.last == metrics.learn == 50.0
    assert metrics.transfer == pytest.approx((60.0 + 15.0 + 80.0) / 3, abs=1e-12)
    assert metrics.forgetting == 0.0


def test_a_single_task_has_no_transfer_and_no_forgetting():
    assert continual_metrics([[70.0]]).as_dict() == {
        "transfer": None, "avg": 70.0, "last": 70.0, "forgetting": None, "learn": 70.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[1.0, 2.0]], r"square matrix .* got shape \(1, 2\)"),
        ([], "square matrix"),
        ([[1.0, 2.0], [3.0, float("nan")]], r"finite, got nan at \[1, 1\]"),
    ],
)
def test_wrong_matrices_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        continual_metrics(bad)


def test_mean_and_std_over_seeds():
    assert mean_std([2.0, 4.0, 6.0]) == {"mean": 4.0, "std": 2.0}
    assert mean_std([5.0]) == {"mean": 5.0, "std": None}
    with pytest.raises(ValueError, match="non-empty"):
        mean_std([])
