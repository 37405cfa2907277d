"""MFT, MFN, MAA and BWT against a published run and values worked out by hand."""

import numpy as np
import pytest

from keeplora.report.instruction_metrics import instruction_metrics

SEQUENTIAL_LORA = [
    [90.5],
    [90.1, 91.67],
    [69.83, 90.13, 61.55],
    [74.4, 71.1, 56.08, 53.83],
    [67.73, 70.63, 53.61, 52.23, 71.67],
    [23.5, 73.37, 47.35, 51.83, 63.57, 58.17],
]
"""UCIT, LLaVA-1.5-7B: BENCHMARKS.md, section 3."""


def square(rows, fill):
    return np.array([[*row, *[fill] * (len(rows) - len(row))] for row in rows])


def test_sequential_lora_on_ucit():
    metrics = instruction_metrics(SEQUENTIAL_LORA)
    assert {name: round(value, 2) for name, value in metrics.as_dict().items()} == {
        "mft": 71.23, "mfn": 52.97, "maa": 72.54, "bwt": -21.92
    }  # fmt: skip


@pytest.mark.parametrize("fill", [float("nan"), 0.0, 1e9])
def test_the_upper_triangle_is_not_read(fill):
    assert instruction_metrics(square(SEQUENTIAL_LORA, fill)) == instruction_metrics(SEQUENTIAL_LORA)


def test_by_hand():
    metrics = instruction_metrics([[90.0], [60.0, 80.0], [30.0, 84.0, 70.0]])
    assert metrics.mft == pytest.approx((90 + 80 + 70) / 3, abs=1e-12)
    assert metrics.mfn == pytest.approx((30 + 84 + 70) / 3, abs=1e-12)
    assert metrics.maa == pytest.approx((90 + (60 + 80) / 2 + (30 + 84 + 70) / 3) / 3, abs=1e-12)
    assert metrics.bwt == pytest.approx(((30 - 90) + (84 - 80)) / 2, abs=1e-12)


def test_a_single_task_has_no_backward_transfer():
    assert instruction_metrics([[70.0]]).as_dict() == {"mft": 70.0, "mfn": 70.0, "maa": 70.0, "bwt": None}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "got none"),
        ([[1.0, 2.0]], r"1 numbers in row 0, .* got shape \(2,\)"),
        ([[1.0], [2.0]], r"2 numbers in row 1, .* got shape \(1,\)"),
        ([[1.0], [2.0, float("nan")]], r"finite, got nan at \[1, 1\]"),
        ([[1.0, 0.0], [float("inf"), 2.0]], r"finite, got inf at \[1, 0\]"),
    ],
)
def test_wrong_matrices_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        instruction_metrics(bad)
