"""Fronts: hand-made runs whose front, choices, changes of place and table are known."""

import csv
import json
import math

import numpy as np
import pytest
from made_records import record_of
from scipy.stats import t

from keeplora.report.fronts import gather, on_front, score
from keeplora.report.fronts_table import choice_rows, findings, report_fronts
from keeplora.train.config import parse_config

ITEMS = 100
RATES = {"lora": (0.1, 0.2, 0.4), "keeplora": (1.0, 2.0, 4.0)}
# Transfer and Last on validation, then on test, in percent; zero-shot has 50 and 50 on both.
PLACES = {
    "lora@0.1": (50, 60, 50, 62), "lora@0.2": (48, 70, 49, 71), "lora@0.4": (40, 90, 45, 70),
    "keeplora@1": (51, 65, 51, 64), "keeplora@2": (50, 68, 50, 70), "keeplora@4": (46, 69, 46, 76),
}  # fmt: skip


def share(percent):
    """The first so many of the items are right, so that two settings differ on as many items as their figures do."""
    return np.arange(ITEMS) < percent


def run_of(label, seed=0, change=0, **rest):
    """Two tasks: Transfer is the second one's accuracy after the first, Last the mean of both at the end."""
    transfer, last, test_transfer, test_last = PLACES.get(label, (50, 50, 50, 50))
    if label == "zero-shot":
        right, validation = [[share(50)] * 2] * 2, [[0.5, 0.5]] * 2
        rest = {"trainable": [], "steps": 0, **rest}
    else:
        right = [[share(80), share(test_transfer)], [share(test_last + change)] * 2]
        validation = [[None, transfer / 100], [last / 100] * 2]
    return record_of(right, label, seed, **{"validation": validation, **rest})


def config_of(out="runs", seeds=(0,)):
    method = {label: {"method": label.partition("@")[0], "learning_rate": float(label.partition("@")[2])}
              for label in PLACES}  # fmt: skip
    return parse_config({"benchmark": "hand-made", "methods": list(PLACES), "method": method, "seeds": list(seeds),
                         "epochs": 1, "evaluate_on": "both", "out": str(out)})  # fmt: skip


LABELS = {method: [f"{method}@{rate:g}" for rate in rates] for method, rates in RATES.items()}


@pytest.fixture
def fronts():
    config = config_of()
    return gather(config, LABELS, [run_of(label, seed) for label, seed in config.pairs()], "keeplora")


def test_every_point_is_where_its_runs_put_it(fronts):
    for method, labels in LABELS.items():
        for point, label in zip(fronts.points[method], labels, strict=True):
            found = (*point.validation.values(), point.figures["transfer"].mean, point.figures["last"].mean)
            assert found == pytest.approx(PLACES[label]), label
    one = fronts.points["lora"][0].figures
    assert one["transfer"].error == pytest.approx(100 * math.sqrt(0.5 * 0.5 / 99))
    assert one["last"].error == pytest.approx(100 * math.sqrt(2 * 0.62 * 0.38 / 99) / 2)


def test_the_front_is_what_no_other_setting_beats(fronts):
    assert on_front([(1, 1), (1, 1), (0, 2), (0, 1)]) == [True, True, True, False]
    found = {method: on_front([(p.figures["transfer"].mean, p.figures["last"].mean) for p in points])
             for method, points in fronts.points.items()}  # fmt: skip
    assert found == {"lora": [True, True, False], "keeplora": [True, True, True]}


@pytest.mark.parametrize(
    ("allowance", "chosen"),
    # lora, 0: 60, 70 - 10, 90 - 50: of equals the lowest rate; 3: 60, 70, 90 - 35. keeplora, 0: 65, 68, 69 - 20
    [(0, {"lora": "lora@0.1", "keeplora": "keeplora@2"}), (3, {"lora": "lora@0.2", "keeplora": "keeplora@2"}),
     (5, {"lora": "lora@0.2", "keeplora": "keeplora@4"}), (10, {"lora": "lora@0.4", "keeplora": "keeplora@4"})],
)  # fmt: skip
def test_the_rate_is_chosen_on_validation_by_the_rule(fronts, allowance, chosen):
    assert {method: fronts.chosen(method, allowance).label for method in LABELS} == chosen
    for method in LABELS:
        best = max(score(*PLACES[label][:2], 50.0, allowance) for label in LABELS[method])
        assert score(*PLACES[chosen[method]][:2], 50.0, allowance) == best


def test_changes_of_place_and_whether_they_are_certain(fronts):
    assert (fronts.ranking(0), fronts.ranking(3)) == (["keeplora", "lora"], ["lora", "keeplora"])
    # Under 3 lora is one point ahead: one item of 100 in either task, t = 1 / (√2 · 0.5 · 10/√99 …), far from certain.
    assert fronts.reversals(0, 3) == {("keeplora", "lora"): False}
    assert fronts.reversals(0, 5) == {}
    text = " ".join(findings(fronts, 1))
    assert "1 of 1 pairs" in text
    assert "keeplora and lora" in text
    assert text.count("none") == 1
    assert "lowest rate tried (allowance 0)" in text
    assert "One seed" in text
    assert "One seed" not in " ".join(findings(fronts, 2))


def test_a_certain_change_of_place_is_named(monkeypatch):
    monkeypatch.setitem(PLACES, "lora@0.2", (48, 70, 49, 90))
    config = config_of()
    found = gather(config, LABELS, [run_of(label, seed) for label, seed in config.pairs()], "keeplora")
    assert found.reversals(0, 3) == {("keeplora", "lora"): True}
    assert "under both (p < 0.05): keeplora and lora" in " ".join(findings(found, 1))


def test_a_choice_that_breaks_the_allowance_is_marked(monkeypatch):
    for label in LABELS["lora"]:
        monkeypatch.setitem(PLACES, label, (45, *PLACES[label][1:]))
    config = config_of()
    found = gather(config, LABELS, [run_of(label, seed) for label, seed in config.pairs()], "keeplora")
    assert [row[0] for row in choice_rows(found, 3)] == ["method", "zero-shot", "lora †", "keeplora"]
    assert "†" in findings(found, 1)[0]
    assert [row[0] for row in choice_rows(found, 5)[2:]] == ["keeplora", "lora"]


def test_files_of_the_report_hold_the_same_numbers(tmp_path):
    config = config_of(tmp_path, seeds=(0, 1))
    records = [run_of(label, seed, 4 * seed, earlier_data=["validation"] if label == "lora@0.1" else [])
               for label, seed in config.pairs()]  # fmt: skip
    text = report_fronts(config, LABELS, records, ["left out: nobody"])
    saved = json.loads((tmp_path / "fronts.json").read_text())
    with (tmp_path / "fronts.csv").open() as file:
        rows = {(row["method"], row["learning_rate"]): row for row in csv.DictReader(file)}
    assert len(rows) == 7
    assert saved["reference"] == "keeplora"
    chosen = saved["chosen"]["3"]
    assert chosen["lora"]["label"] == "lora@0.2"
    row = rows["lora", "0.2"]
    assert (row["chosen_at_allowance"], row["on_front"], row["earlier_data"]) == ("3", "True", "")
    assert float(row["last_mean"]) == saved["methods"]["lora"][1]["test"]["last"]["mean"] == pytest.approx(73.0)
    # Seeds 71 and 75, and of each task's items two that only one seed has right, four halves.
    seeds = (75 - 71) ** 2 / 2 / 2
    values = np.where(np.arange(100) < 71, 100.0, np.where(np.arange(100) < 75, 50.0, 0.0))
    assert float(row["last_error"]) == pytest.approx(math.sqrt(seeds + 2 * values.var(ddof=1) / 100 / 4))
    # keeplora@2 has one item of each task less right, with either seed.
    difference = np.where((np.arange(100) == 70) | (np.arange(100) == 74), 50.0, 0.0)
    tested = chosen["lora"]["less_reference"]["last"]
    assert tested["mean"] == pytest.approx(1.0)
    assert tested["error"] == pytest.approx(math.sqrt(2 * difference.var(ddof=1) / 100 / 4))
    assert tested["p"] == pytest.approx(2 * t.sf(1 / tested["error"], 198))  # two tasks of 99 degrees of freedom
    assert chosen["keeplora"]["less_reference"]["last"]["p"] == 1.0
    markdown = (tmp_path / "fronts.md").read_text()
    assert markdown.count("| keeplora | 2 |") == 2
    assert markdown.count("validation | 64 | 67 |") == 1  # lora@0.1, under allowance 0
    assert "left out: nobody" in text
    assert "left out: nobody" in markdown
    assert (tmp_path / "summary.json").is_file()
    from matplotlib.image import imread

    from keeplora.report.plots import colours

    pixels = (imread(tmp_path / "fronts.png")[..., :3] * 255).round().astype(int)
    for method, colour in colours(list(LABELS)).items():
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).sum(-1) == 0).sum() > 200, method


def test_a_setting_that_diverged_is_left_out_by_name(tmp_path):
    config = config_of(tmp_path, seeds=(0, 1))
    records = [run_of(label, seed) for label, seed in config.pairs()]
    broken = next(record for record in records if (record.label, record.seed) == ("keeplora@4", 1))
    broken.accuracy, broken.failed = broken.accuracy[:1], "the loss was nan"
    text = report_fronts(config, LABELS, records, reference="lora")
    assert "left out: keeplora@4 (the loss was nan)" in text
    saved = json.loads((tmp_path / "fronts.json").read_text())
    assert [one["label"] for one in saved["methods"]["keeplora"]] == ["keeplora@1", "keeplora@2"]
    assert saved["reference"] == "lora"
