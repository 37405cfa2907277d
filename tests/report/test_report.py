"""The report of a benchmark: summary.json by its schema, tables, matrices, charts."""

import csv
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from keeplora.lora import Target
from keeplora.methods import Capacity
from keeplora.methods.capacity import layer_capacity
from keeplora.report import report_run
from keeplora.report.capacity import plot_capacity, record_capacity, tightest_run
from keeplora.report.plots import _bars, apart, colours, curves_figure, plot_comparison
from keeplora.report.summary import summarize, worst_certificate
from keeplora.report.table import result_table
from keeplora.train.config import parse_config
from keeplora.train.record import RunRecord

TASKS = ["ants", "bees", "cats"]
LABELS = ["zero-shot", "full", "lora", "keeplora", "keeplora++"]


def config_of(out, seeds=(0, 1)):
    methods = {"keeplora++": {"learning_rate": 2e-3, "r": 8}}
    return parse_config(
        {
            "benchmark": "embedded",
            "methods": LABELS[1:],
            "seeds": list(seeds),
            "epochs": 1,
            "out": str(out),
            "method": methods,
        }
    )


def record_of(label, seed):
    accuracy = [[0.5, 0.25, 0.125]] * 3
    certificates, capacity = [None] * 3, []
    if label != "zero-shot":
        accuracy = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.1], [0.6, 0.8 + seed / 16, 0.9]]
    if label.startswith("keep"):
        certificates = [
            {
                "leak": 1e-8 * (task + 1 + seed), "leak_after_rounding": 1e-6, "orthogonality": 1e-7 * (2 - task / 2),
                "captured": 0.99 - 0.01 * task,
                "layers": [{"protected": 10 + 4 * task, "added": 4}, {"protected": 16 + 3 * task, "added": 3}],
            }
            for task in range(3)
        ]  # fmt: skip
        layers = tuple(
            layer_capacity(
                Target(f"visual.0.attn.{part}_proj", "visual.0.attn", "weight", None, 0, "vision"), *sizes, r=4
            )
            for part, sizes in (("q", (32, 18, (4, 4, 4))), ("out", (32, 22 + seed, (3, 3, 3 + seed))))
        )
        capacity = Capacity(layers, 3).to_dict()["layers"]
    return RunRecord(
        label, seed, TASKS, accuracy, [0.4, 0.3, 0.2], [1.0] * 3, [2.0] * 3, [0.5] * 3, [0.25] * 3, certificates,
        capacity, [64, 64, 32], 30, 1000 + seed, [0.22, 0.2],
    )  # fmt: skip


@pytest.fixture
def finished(tmp_path):
    config = config_of(tmp_path)
    return config, [record_of(label, seed) for label, seed in config.pairs()]


def test_summary_has_the_documented_form(finished):
    config, records = finished
    text = report_run(config, records)
    assert str(config.out) in text
    with open(f"{config.out}/summary.json") as file:
        summary = json.load(file)
    assert {"benchmark", "seeds", "zero_shot", "methods", "certificates", "environment"} <= set(summary)
    assert summary["seeds"] == [0, 1]
    assert set(summary["methods"]) == {"full", "lora", "keeplora", "keeplora++"}
    for values in summary["methods"].values():
        documented = {
            "transfer", "avg", "last", "forgetting", "learn", "train_seconds", "switch_seconds", "peak_bytes"
        }  # fmt: skip
        assert documented <= set(values)
        assert all(set(entry) == {"mean", "std"} for entry in values.values())
    assert set(summary["certificates"]) == {"keeplora", "keeplora++"}
    for name in ("python", "packages", "cpu", "threads", "git_commit", "peak_bytes"):
        assert name in summary["environment"]
    assert summary["settings"]["keeplora++"] == {"method": "keeplora++", "learning_rate": 2e-3, "r": 8}


def test_summary_values_are_percent_over_seeds(finished):
    config, records = finished
    summary = summarize(config, records)
    lora = summary["methods"]["lora"]
    last = [100 * (0.6 + 0.8 + seed / 16 + 0.9) / 3 for seed in (0, 1)]
    assert lora["last"]["mean"] == pytest.approx(statistics.mean(last), abs=1e-9)
    assert lora["last"]["std"] == pytest.approx(statistics.stdev(last), abs=1e-9)
    assert lora["transfer"]["mean"] == pytest.approx(100 * (0.2 + (0.1 + 0.1) / 2) / 2, abs=1e-9)
    assert lora["forgetting"]["mean"] == pytest.approx(100 * (0.3 + 0.0) / 2, abs=1e-9)
    assert lora["train_seconds"] == {"mean": 6.0, "std": 0.0}
    assert lora["switch_seconds"]["mean"] == 1.5
    assert lora["peak_bytes"]["mean"] == 1000.5
    assert lora["trainable_parameters"]["mean"] == 64
    assert lora["witness"]["mean"] == pytest.approx(20.0, abs=1e-9)  # after the last task
    assert summary["zero_shot"]["last"]["mean"] == pytest.approx(100 * 0.875 / 3, abs=1e-9)


def test_worst_certificate_is_over_tasks_and_seeds():
    records = [record_of("keeplora", seed) for seed in (0, 1)]
    worst = worst_certificate(records)
    assert worst == pytest.approx(
        {"leak": 4e-8, "leak_after_rounding": 1e-6, "orthogonality": 2e-7, "captured": 0.97}, rel=1e-12
    )
    assert worst_certificate([record_of("lora", 0)]) is None


def test_csv_files(finished):
    config, records = finished
    report_run(config, records)
    with open(f"{config.out}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], int(row["seed"])) for row in rows] == config.pairs()
    assert float(rows[2]["learn"]) == pytest.approx(100 * (0.9 + 0.8 + 0.9) / 3)
    with open(f"{config.out}/runs/lora/seed-1/accuracy.csv") as file:
        matrix = list(csv.reader(file))
    assert matrix[0] == ["after", *TASKS, "witness"]
    assert matrix[3] == ["cats", "60.0000", "86.2500", "90.0000", "20.0000"]


def test_table_shows_every_method_and_metric(finished):
    config, records = finished
    table = result_table(summarize(config, records))
    lines = table.splitlines()
    assert lines[0] == "embedded: 3 tasks, 2 seeds, accuracy on test in percent (mean ± std)"
    for column in ("Transfer", "Avg", "Last", "Forgetting", "Learned", "Witness"):
        assert column in lines[1]
    assert [line.split()[0] for line in lines[3:]] == LABELS
    assert "77.7 ± 1.5" in lines[5]  # lora's Last: 76.67 and 78.75
    assert lines[6].split()[-1] == "1e-06"  # of the stored weights, as in a certificate: not the factors' 4e-08


def test_charts_are_pictures_of_the_right_things(finished, tmp_path):
    from matplotlib.image import imread

    config, records = finished
    report_run(config, records)
    names = {"demo.png", "capacity.png", *(f"accuracy-{label}.png" for label in LABELS)}
    assert {file.name for file in tmp_path.glob("*.png")} == names
    for name in names:
        pixels = imread(tmp_path / name)
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 500
        assert pixels[..., :3].std() > 0.05  # not an empty page
    palette = colours(LABELS[1:])
    assert len(set(palette.values())) == 4
    chart = (imread(tmp_path / "demo.png")[..., :3] * 255).round().astype(int)
    for label, colour in palette.items():
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(chart - rgb).sum(-1) == 0).sum() > 500, f"{label} is not in the chart"


@pytest.mark.parametrize(("count", "std"), [(3, 0.0), (9, 2.0)])
def test_no_value_is_struck_through_by_the_line_of_zero_shot(count, std):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = ("last", "avg", "transfer")  # as the chart has them
    for zeros in np.linspace(32, 52, 21).reshape(7, 3):
        heights = np.linspace(38, 42, count)
        methods = {f"m{i}": {key: {"mean": mean, "std": std} for key in keys} for i, mean in enumerate(heights)}
        lines = {key: {"mean": zero} for key, zero in zip(keys, zeros, strict=True)}
        figure = Figure(figsize=(7, 5.6), layout="constrained")
        axes = figure.subplots()
        _bars(axes, {"zero_shot": lines, "methods": methods}, list(methods), colours(methods))
        FigureCanvasAgg(figure).draw()
        assert len(axes.texts) == 3 * count
        for text in axes.texts:
            box, zero = text.get_window_extent(), zeros[round(text.get_position()[0])]
            line = axes.transData.transform((0, zero))[1]
            assert not box.y0 < line < box.y1, f"{text.get_text()} at zero-shot {zero}"


def test_curves_that_coincide_can_both_be_seen(tmp_path):
    from matplotlib.image import imread

    from keeplora.report.style import save

    config = config_of(tmp_path)
    runs = {label: [record_of(label, seed) for seed in (0, 1)] for label in LABELS}
    shown = summarize(config, [record for each in runs.values() for record in each])
    shown["methods"] = {label: shown["methods"][label] for label in ("full", "lora", "keeplora", "keeplora++")}
    save(curves_figure(shown, runs), tmp_path / "curves.png")
    pixels = (imread(tmp_path / "curves.png")[..., :3] * 255).round().astype(int)
    pixels = pixels[:, : pixels.shape[1] * 7 // 10]  # without the names at the right
    for label, colour in colours(list(shown["methods"])).items():
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).sum(-1) <= 3).sum() > 300, f"{label} is hidden"


def test_names_at_the_ends_of_lines_stand_apart_and_in_order():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = sorted(rng.normal(0, 3, 12))
        places = np.array(apart(values, 1.0))
        assert (np.diff(places) > 1 - 1e-9).all()
        assert abs(places.mean() - np.mean(values)) < 1e-9
    assert apart([0.0, 5.0, 9.0], 1.0) == [0.0, 5.0, 9.0]


def test_names_of_tasks_are_no_formulas(tmp_path):
    config = config_of(tmp_path)
    records = [replace(record_of(label, seed), tasks=["a $x_$", "$\\frac$", "c"]) for label, seed in config.pairs()]
    report_run(config, records)  # TeX would refuse both
    plot_comparison(tmp_path / "demo.png", summarize(config, records), dict.fromkeys(LABELS, records))


def test_one_seed_one_method_and_no_basis(tmp_path):
    config = parse_config({"benchmark": "embedded", "methods": ["lora"], "epochs": 1, "out": str(tmp_path)})
    report_run(config, [record_of(label, seed) for label, seed in config.pairs()])
    assert (tmp_path / "demo.png").is_file()
    assert not (tmp_path / "capacity.png").exists()
    assert not (tmp_path / "capacity.txt").exists()
    assert tightest_run([record_of("lora", 0)]) is None
    assert not plot_capacity(tmp_path / "capacity.png", {})


def test_the_room_that_is_left_is_reported_of_the_tightest_seed(finished):
    config, records = finished
    text = report_run(config, records)
    line = "room left by keeplora, seed 1: 36% of the space of 2 layers is free; room for 2 more tasks like the last"
    assert line in text
    tables = (config_path := Path(config.out) / "capacity.txt").read_text()
    assert str(config_path) in text
    assert tables.startswith("keeplora, seed 1\ncapacity after task 3: 36%")
    assert "fill first: visual.0.attn.out_proj (9 of 32 free, 2), visual.0.attn.q_proj (14 of 32 free, 3)" in tables
    room = summarize(config, records)["capacity"]
    assert room == {
        label: {"seed": 1, "free_share": 23 / 64, "forecast": 2, "median_forecast": 3}
        for label in ("keeplora", "keeplora++")
    }


def test_a_keepers_capacity_can_be_drawn(tmp_path):
    from matplotlib.image import imread

    capacity = record_capacity(record_of("keeplora", 0))
    whole, partly, fresh = tmp_path / "whole.png", tmp_path / "partly.png", tmp_path / "fresh.png"
    assert plot_capacity(whole, {"mine": capacity})
    late = [replace(layer, added_by_task=layer.added_by_task[-1:]) for layer in capacity]
    assert plot_capacity(partly, {"most of it before its one task": Capacity(tuple(late), 1)})
    unused = [layer_capacity(Target(n, "", "weight", None, 0, "model"), 32, 0, (), r=4) for n in "ab"]
    assert plot_capacity(fresh, {"before the first task": Capacity(tuple(unused), 0)})
    grey, dark = ((np.array([value] * 3)) for value in (0xF0, 0x33))

    def pixels(file, colour):
        found = (imread(file)[..., :3] * 255).round().astype(int)
        return (np.abs(found - colour).sum(-1) <= 12).sum()

    assert pixels(fresh, grey) > pixels(whole, grey) > 5000
    assert pixels(partly, dark) > pixels(whole, dark) > 5000
    with pytest.raises(ValueError, match=r"tasks must have a name for each of 3 tasks, got \['a'\] \[mine\]"):
        plot_capacity(whole, {"mine": capacity}, ["a"])


def test_zero_shot_alone_still_reports(tmp_path):
    config = parse_config({"benchmark": "embedded", "methods": ["zero-shot"], "epochs": 1, "out": str(tmp_path)})
    assert "zero-shot" in report_run(config, [record_of("zero-shot", 0)])


def test_models_that_answer_have_the_instruction_benchmarks_columns():
    from keeplora.report.table import result_table

    values = {name: {"mean": 1.0, "std": 0.0} for name in ("transfer", "avg", "last", "forgetting", "learn")}
    more = {name: {"mean": 2.0, "std": 0.0} for name in ("mft", "mfn", "maa", "bwt", "train_seconds", "switch_seconds")}
    summary = {
        "benchmark": "x", "tasks": ["a", "b"], "seeds": [0], "split": "test", "certificates": {},
        "zero_shot": {name: values[name] for name in ("transfer", "avg", "last")},
        "methods": {"lora": {**values, **more}},
    }  # fmt: skip
    header = result_table({**summary, "answers": True}).splitlines()[1].split()
    assert header[:5] == ["Transfer", "MFT", "MFN", "MAA", "BWT"]
    assert result_table(summary).splitlines()[1].split()[:5] == ["Transfer", "Avg", "Last", "Forgetting", "Learned"]


def charts(config):
    return {path.name: path.stat().st_mtime_ns for path in Path(config.out).glob("*.png")}


def test_charts_are_drawn_once(finished):
    config, records = finished
    text = report_run(config, records)
    before = charts(config)
    assert set(before) == {"demo.png", "capacity.png", *(f"accuracy-{label}.png" for label in LABELS)}
    assert report_run(config, records) == text
    assert charts(config) == before


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"half")])
@pytest.mark.parametrize("name", ["demo.png", "charts.json"])
def test_a_chart_that_is_gone_or_damaged_is_drawn_again(finished, name, damage):
    config, records = finished
    report_run(config, records)
    before = charts(config)
    damage(Path(config.out) / name)
    report_run(config, records)
    assert set(charts(config)) == set(before)
    assert not set(charts(config).items()) & set(before.items())


def test_charts_of_other_figures_are_drawn(finished):
    config, records = finished
    report_run(config, records)
    before = charts(config)
    records[1].accuracy[0][0] = 0.95
    report_run(config, records)
    assert not set(charts(config).items()) & set(before.items())
