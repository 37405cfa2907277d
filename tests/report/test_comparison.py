"""The report of a comparison: rows, units, CSV, Markdown and charts that show what the records hold."""

import csv
import json

import numpy as np
import pytest

from keeplora.lora import Target
from keeplora.methods import Capacity
from keeplora.methods.capacity import layer_capacity
from keeplora.report.comparison import markdown_table, report_comparison, table_rows
from keeplora.report.comparison_plots import _changes, plot_protected
from keeplora.report.plots import colours
from keeplora.report.summary import run_values, summarize
from keeplora.train.config import parse_config
from keeplora.train.record import RunRecord

TASKS = ["ants", "bees", "cats"]
LABELS = ["zero-shot", "lora", "keeplora", *(f"method-{i}" for i in range(6))]


def record_of(label, seed):
    accuracy = [[0.5, 0.25, 0.125]] * 3
    if label != "zero-shot":
        less = 0.01 * LABELS.index(label)
        accuracy = [[0.9, 0.2, 0.1], [0.7 - less, 0.8, 0.1], [0.6 - less, 0.8 - less + seed / 16, 0.9]]
    capacity = []
    if label == "keeplora":
        layers = tuple(
            layer_capacity(
                Target(f"{tower}.0.attn.{part}", "", "weight", None, 0, tower), 32, protected, (4, 4, 4), r=4
            )
            for tower, part, protected in (("text", "o_proj", 24), ("vision", "v_proj", 16), ("vision", "q_proj", 32))
        )
        capacity = Capacity(layers, 3).to_dict()["layers"]
    return RunRecord(
        label, seed, TASKS, accuracy, [0.4, 0.3, 0.2], [1.0] * 3, [2.0] * 3, [0.5] * 3, [0.25] * 3, [None] * 3,
        capacity, [64, 64, 32], 30, 10**9 + seed, [0.22, 0.2],
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    config = parse_config(
        {"benchmark": "embedded", "methods": LABELS[1:], "seeds": [0, 1], "epochs": 1, "out": str(out),
         "method": {label: {"method": "lora"} for label in LABELS if label.startswith("method")}}
    )  # fmt: skip
    records = [record_of(label, seed) for label, seed in config.pairs()]
    return config, records, report_comparison(config, records, ["left out: nobody"]), out


def test_costs_of_a_run():
    values = run_values(record_of("lora", 0))
    assert values["seconds_per_step"] == pytest.approx(6.0 / 30)
    assert values["inference_overhead"] == pytest.approx(10.0)


def test_the_table_has_every_method_and_cost(finished):
    config, records, shown, out = finished
    rows = table_rows(summarize(config, records))
    assert rows[0] == ["method", "Transfer", "Avg", "Last", "Forgetting", "trained", "ms/step", "switch s", "peak MB",
                       "inference %"]  # fmt: skip
    assert [row[0] for row in rows[1:]] == LABELS
    last = 100 * np.array([[0.59, 0.79 + seed / 16, 0.9] for seed in (0, 1)]).mean(1)
    assert rows[2][3] == f"{last.mean():.1f} ± {last.std(ddof=1):.1f}"
    assert rows[2][5:] == ["64", "200", "1.5", "1,000", "+10"]
    assert rows[1][4:] == [""] * 6  # zero-shot forgets and costs nothing
    lines = shown.splitlines()
    assert "mean ± std of 2 seeds" in lines[0]
    assert [line.split()[0] for line in lines[3 : 3 + len(LABELS)]] == LABELS
    assert "left out: nobody" in lines
    markdown = (out / "table.md").read_text()
    assert markdown.startswith(markdown_table(rows))
    assert len({line.count("|") for line in markdown.splitlines()[: len(rows) + 1]}) == 1


def test_csv_and_json_hold_the_same_numbers(finished):
    _, _, _, out = finished
    with (out / "comparison.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    summary = json.loads((out / "summary.json").read_text())
    assert list(rows) == LABELS
    for label, values in summary["methods"].items():
        for key in ("transfer", "last", "seconds_per_step", "inference_overhead"):
            assert float(rows[label][f"{key}_mean"]) == values[key]["mean"]
            assert float(rows[label][f"{key}_std"]) == values[key]["std"]
    assert rows["zero-shot"]["forgetting_mean"] == ""


def test_forgetting_is_the_change_since_right_after_learning():
    matrix = np.array([[90.0, 20, 10], [70, 80, 10], [60, 79, 85]])
    assert _changes(matrix) == pytest.approx([0.0, (-20 - 1) / 2, -30.0])


def test_charts_show_every_method(finished):
    from matplotlib.image import imread

    _, _, _, out = finished
    charts = {"matrices.png", "last-transfer.png", "forgetting.png", "capacity.png"}
    assert charts <= {file.name for file in out.glob("*.png")}
    palette = colours(LABELS[1:])
    assert len(set(palette.values())) == len(LABELS) - 1
    for name in ("last-transfer.png", "forgetting.png"):
        pixels = (imread(out / name)[..., :3] * 255).round().astype(int)
        for label, colour in palette.items():
            rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(pixels - rgb).sum(-1) == 0).sum() > 60, f"{label} is not in {name}"
    sheet = imread(out / "matrices.png")
    assert sheet.shape[0] > 600
    assert sheet[..., :3].std() > 0.1


def test_protected_shares_are_drawn_where_there_are_any(tmp_path):
    from matplotlib.image import imread

    assert not plot_protected(tmp_path / "none.png", {})
    assert not (tmp_path / "none.png").exists()
    shades = {}
    for share in (0, 32):
        layers = [layer_capacity(Target(n, "", "weight", None, 0, "model"), 32, share, (), r=4) for n in "ab"]
        assert plot_protected(tmp_path / f"{share}.png", {"mine": Capacity(tuple(layers), 1)})
        shades[share] = imread(tmp_path / f"{share}.png")[..., :3].mean()
    assert shades[32] < shades[0] - 0.1  # more protected is darker


def test_one_seed_of_one_method(tmp_path):
    config = parse_config({"benchmark": "embedded", "methods": ["lora"], "epochs": 1, "out": str(tmp_path)})
    text = report_comparison(config, [record_of(label, seed) for label, seed in config.pairs()])
    assert "one seed" in text
    assert not (tmp_path / "capacity.png").exists()
