"""What Weights & Biases and MLflow are told of a run, by their own packages, without a network."""

import json

import pytest
from tiny_workload import workload as tiny

from keeplora.methods.settings import ConfigError
from keeplora.train.config import parse_config
from keeplora.train.loop import run_one
from keeplora.train.trackers import TRACKERS

VALUES = {
    "benchmark": "x", "methods": ["lora"], "steps": 10, "batch_size": 16, "precision": "fp32", "workers": 0,
    "tensorboard": False, "method": {"lora": {"r": 2, "learning_rate": 1e-3}},
}  # fmt: skip


class Killed(BaseException):
    pass


def kill_in_the_second_task(event):
    if event.kind == "step" and event.task == 1 and event.step == 5:
        raise Killed


def run(folder, tracker, listener=None):
    config = parse_config({**VALUES, "trackers": [tracker]})
    return run_one(config, tiny("cpu"), "lora", 0, folder=folder, **({"listener": listener} if listener else {}))


def test_mlflow_has_loss_and_accuracies_and_goes_on_after_a_kill(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    with pytest.raises(Killed):
        run(tmp_path / "run", "mlflow", kill_in_the_second_task)
    record = run(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    (only,) = client.search_runs([client.get_experiment_by_name("keeplora").experiment_id])
    assert only.info.status == "FINISHED"
    assert only.info.run_name == "x lora seed 0"
    assert only.data.params["learning_rate"] == "0.001"
    assert [point.step for point in client.get_metric_history(only.info.run_id, "train/loss")] == [10, 20, 30]
    told = client.get_metric_history(only.info.run_id, "accuracy/squares-2")
    assert [point.value for point in told] == pytest.approx([100 * row[2] for row in record.accuracy])


def test_wandb_keeps_a_run_offline(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    begin = wandb.init

    def watched(**settings):
        made = begin(**settings)
        log = made.log
        monkeypatch.setattr(made, "log", lambda points: (logged.append(points), log(points)))
        return made

    monkeypatch.setattr(wandb, "init", watched)
    record = run(tmp_path / "run", "wandb")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [points["step"] for points in logged if "train/loss" in points] == [10, 20, 30]
    told = [points["accuracy/squares-0"] for points in logged if "accuracy/squares-0" in points]
    assert told == pytest.approx([100 * row[0] for row in record.accuracy])
    assert json.loads((tmp_path / "run" / "tracked.json").read_text())["wandb"]


def test_a_tracker_that_nobody_knows_or_has_is_refused(monkeypatch):
    from keeplora.report import info

    with pytest.raises(ConfigError, match="trackers must be one of wandb, mlflow, got 'wanb'"):
        parse_config({**VALUES, "trackers": ["wanb"]})
    monkeypatch.setattr(info, "find_spec", lambda name: None if name in TRACKERS else object())
    with pytest.raises(ConfigError, match=r"got no wandb, mlflow. Run pip install wandb mlflow-skinny"):
        info.check_machine(parse_config({**VALUES, "trackers": ["wandb", "mlflow"]}))
