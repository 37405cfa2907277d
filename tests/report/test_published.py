"""Every figure printed for a published accuracy matrix follows from it."""

import json
from pathlib import Path

import numpy as np
import pytest

from keeplora.report.metrics import continual_metrics, task_metrics

DATA = Path(__file__).parent / "data"
HALF_A_DIGIT = 0.05 + 5e-5  # of what is printed, with one decimal, and of the matrix, with four


def runs():
    for name, run in json.loads((DATA / "mtil_order1.json").read_text()).items():
        yield name, run["matrix"], run["transfer"], run["avg"], run["last"], run["mean"]
    run = json.loads((DATA / "x_tail_lada.json").read_text())
    yield "LADA", run["matrix"], run["transfer"], run["average"], run["last"], run["means"]


RUNS = list(runs())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run[0])
def test_what_is_printed_follows_from_the_matrix(run):
    _, matrix, transfer, avg, last, means = run
    headline, columns = continual_metrics(matrix), task_metrics(matrix)
    assert [headline.transfer, headline.avg, headline.last] == pytest.approx(means, abs=HALF_A_DIGIT)
    assert columns["transfer"] == pytest.approx(transfer, abs=HALF_A_DIGIT)
    assert columns["avg"] == pytest.approx(avg, abs=HALF_A_DIGIT)
    assert columns["last"] == pytest.approx(last, abs=HALF_A_DIGIT)


def test_all_published_runs_are_there():
    assert len(RUNS) == 8
    assert {len(run[1]) for run in RUNS} == {10, 11}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run[0])
def test_the_other_way_round_it_does_not_follow(run):
    """The files have a row for each task learned: transposed they give other figures, so the check can fail."""
    turned = continual_metrics(np.asarray(run[1]).T)
    assert abs(turned.transfer - run[5][0]) > 1
