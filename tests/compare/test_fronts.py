"""`keeplora compare --fronts`: one small run from the command to the files, and what is refused before it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_workload
import torch

from keeplora import cli
from keeplora.compare.comparison import RATES, at_rates, comparison
from keeplora.methods.settings import ConfigError
from keeplora.report import info
from keeplora.tasks import Split
from keeplora.train import loop
from keeplora.train.config import parse_config
from keeplora.train.loop import run_one
from keeplora.train.record import load_result, run_folder

TINY = """
benchmark = "tiny_workload:workload"
batch_size = 16
precision = "fp32"
workers = 0
tensorboard = false
[budget.full]
steps = 3
seeds = [0, 1]
[method.lora]
r = 4
learning_rate = 3e-3
[method.lines]
base = "lora"
settings = { r = 4 }
grid = [1.0, 0.0]
learning_rate = 3e-2
[method.joint]
learning_rate = 1e-3
"""


def test_every_method_runs_at_every_rate(tiny):
    chosen = comparison(tiny, methods=["lora", "joint"], fronts=(3, 1 / 3, 1))
    assert chosen.fronts == {
        "lora": ("lora@0.001", "lora@0.003", "lora@0.009"), "joint": ("joint@0.00033", "joint@0.001", "joint@0.003"),
    }  # fmt: skip
    assert chosen.config.labels() == ("zero-shot", *chosen.fronts["lora"], *chosen.fronts["joint"])
    entry = chosen.config.of("lora@0.009")
    assert (entry.method, entry.learning_rate, entry.settings) == ("lora", 0.009, {"r": 4})
    assert (chosen.config.evaluate_on, chosen.config.split) == ("both", "test")
    assert chosen.config.out == "runs/fronts-tiny-full"
    plain = comparison(tiny, methods=["lora"])
    assert (plain.fronts, plain.config.evaluate_on) == ({}, "test")
    assert len(RATES) == 3


@pytest.mark.parametrize("factors", [(), (0.0,), (-1.0, 1.0), (float("nan"),), (float("inf"),)])
def test_factors_that_give_no_rate_are_refused(tiny, factors):
    with pytest.raises(ConfigError, match="fronts must be multiples"):
        comparison(tiny, methods=["lora"], fronts=factors)


def test_zero_shot_alone_has_no_front():
    with pytest.raises(ConfigError, match="one that learns, got zero-shot"):
        at_rates(parse_config({"benchmark": "b", "methods": ["zero-shot"], "steps": 1}), RATES)


@pytest.mark.parametrize(("reference", "message"), [("joint", "lora, got 'joint'"), ("lor", "Did you mean 'lora'")])
def test_a_reference_that_does_not_run_is_refused(tiny, reference, message):
    with pytest.raises(ConfigError, match=f"reference must be .*{message}"):
        comparison(tiny, methods=["lora"], fronts=RATES, reference=reference)


def test_from_the_command_to_the_files(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["compare", "--benchmark", tiny, "--out", str(out), "--methods", "lora", "lines", "--seeds", "1"]
    assert cli.main([*arguments, "--reference", "lora", "--fronts", "1"]) == 0
    assert cli.main([*arguments, "--reference", "lora", "--fronts", "1", "0.1"]) == 0  # a rate more
    shown = capsys.readouterr()
    assert "3 methods, 5 settings x 1 seeds" in shown.err
    assert shown.err.count("already finished") == 3
    for name in ("fronts.md", "fronts.csv", "fronts.json", "fronts.png", "summary.json", "metrics.csv"):
        assert (out / name).stat().st_size > 100, name
    saved = json.loads((out / "fronts.json").read_text())
    assert [one["label"] for one in saved["methods"]["lora"]] == ["lora@0.0003", "lora@0.003"]
    assert [one["earlier_data"] for one in saved["methods"]["lines"]] == [["validation"]] * 2
    assert [one["earlier_data"] for one in saved["methods"]["lora"]] == [[]] * 2
    config = comparison(tiny, methods=["lora"], fronts=(1,), seeds=1).config
    record = load_result(run_folder(out, "lora@0.003", 0), config.identity("lora@0.003", 0))
    last = 100 * np.mean([record.right(2, j).mean() for j in range(3)])
    assert saved["methods"]["lora"][1]["test"]["last"]["mean"] == pytest.approx(last)


def test_which_items_were_right_and_what_validation_is_needed(tmp_path):
    """Beside plain runs on either split: the same numbers, and no evaluation more than Transfer and Last take."""
    values = {"benchmark": "tiny_workload:workload", "methods": ["joint"], "steps": 3, "batch_size": 16,
              "precision": "fp32", "workers": 0, "tensorboard": False,
              "method": {"joint": {"learning_rate": 1e-3}}}  # fmt: skip
    workload, asked = tiny_workload.workload("cpu"), []
    plain = workload.accuracy
    workload.accuracy = lambda model, task, split, size: asked.append((task, split)) or plain(model, task, split, size)
    record = run_one(parse_config({**values, "evaluate_on": "both"}), workload, "joint", 0)
    assert [task for task, split in asked if split == "validation"] == [1, 2, 2, 0, 1, 2]
    for split, found in (("test", record.accuracy), ("validation", record.validation)):
        alone = run_one(parse_config({**values, "evaluate_on": split}), tiny_workload.workload("cpu"), "joint", 0)
        for i in range(3):
            for j in range(3):
                if split == "validation" and j <= i < 2:
                    assert found[i][j] is None
                else:
                    assert found[i][j] == pytest.approx(alone.accuracy[i][j], rel=1e-12)
    assert (record.items, record.earlier_data) == ([32] * 3, ["training"])
    whole = workload.correct(tiny_workload.model(), 1, "test", 256)
    assert torch.equal(whole, workload.correct(tiny_workload.model(), 1, "test", 5))
    order = torch.randperm(32)
    task = workload.task(1)
    turned = Split(task.test.images[order], task.test.labels[order])
    workload._tasks[1] = replace(task, test=turned)
    assert torch.equal(workload.correct(tiny_workload.model(), 1, "test", 7), whole[order])


def test_an_untrained_model_is_evaluated_once_on_both():
    workload = tiny_workload.workload("cpu")
    config = parse_config({"benchmark": "tiny_workload:workload", "methods": ["zero-shot"], "steps": 1, "workers": 0,
                           "tensorboard": False, "evaluate_on": "both"})  # fmt: skip
    record = run_one(config, workload, "zero-shot", 0)
    assert None not in record.validation[0]
    assert record.validation == [record.validation[0]] * 3
    assert record.correct == [record.correct[0]] * 3


def test_scipy_is_missed_before_anything_runs(monkeypatch):
    monkeypatch.setattr(info, "find_spec", lambda name: None if name == "scipy" else name)
    values = {"benchmark": "embedded", "methods": ["lora"], "steps": 1, "tensorboard": False}
    info.check_machine(parse_config(values))
    with pytest.raises(ConfigError, match="scipy must be installed"):
        info.check_machine(parse_config({**values, "evaluate_on": "both"}))


def test_a_benchmark_that_tells_no_items_is_refused(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(tiny_workload.ClassificationWorkload, "correct")
    out = tmp_path / "out"
    assert cli.main(["compare", "--benchmark", tiny, "--methods", "lora", "--fronts", "--out", str(out)]) == 2
    assert "benchmark must tell which test items are right" in capsys.readouterr().err
    assert not out.exists()


def test_a_rate_at_which_the_loss_is_not_finite_ends_that_run_alone(tmp_path):
    config = parse_config({"benchmark": "tiny_workload:broken", "methods": ["lora"], "steps": 3, "batch_size": 16,
                           "workers": 0, "tensorboard": False, "out": str(tmp_path),
                           "evaluate_on": "both"})  # fmt: skip
    told = []
    for _ in range(2):  # the second time it is read
        record = run_one(config, tiny_workload.broken("cpu"), "lora", 0, folder=tmp_path, listener=told.append)
        assert "loss must be finite" in record.failed
        assert record.finished_tasks == 1
    assert [event.text[:10] for event in told if event.kind == "done"] == ["given up: ", "already fi"]


def test_other_errors_end_a_run_as_ever(monkeypatch):
    config = parse_config({"benchmark": "tiny_workload:workload", "methods": ["lora"], "steps": 1, "workers": 0,
                           "tensorboard": False, "evaluate_on": "both"})  # fmt: skip
    monkeypatch.setattr(loop._Run, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_one(config, tiny_workload.workload("cpu"), "lora", 0)
