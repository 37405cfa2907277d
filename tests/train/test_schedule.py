"""How the rate moves within a task, and that epochs and rates may differ between tasks."""

import pytest
import torch
from tiny_workload import workload as tiny
from torch.optim import AdamW

from keeplora.compare.runs import check_methods
from keeplora.methods.settings import ConfigError
from keeplora.train import loop
from keeplora.train.config import parse_config
from keeplora.train.loop import run_one
from keeplora.train.schedule import make_schedule

VALUES = {"benchmark": "x", "methods": ["lora"], "batch_size": 16, "precision": "fp32", "workers": 0}


def config_of(**changes):
    return parse_config({**VALUES, "epochs": 1, **changes})


def rates(config, steps, rate=0.5):
    optimizer = AdamW([torch.zeros(1, requires_grad=True)], lr=rate)
    schedule, seen = make_schedule(config, optimizer, rate, steps), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_the_cosine_is_that_of_transformers():
    import transformers

    optimizer = AdamW([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule, theirs = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 20), []
    for _ in range(20):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(config_of(schedule="cosine", warmup=0.1), 20) == pytest.approx(theirs)


def test_one_cycle_is_the_default_and_ends_near_nothing():
    seen = rates(config_of(), 20)
    assert max(seen) == pytest.approx(0.5, rel=0.01)
    assert seen[-1] < 1e-3


def test_epochs_and_rates_are_those_of_the_task(monkeypatch):
    given = []

    def watched(config, optimizer, rate, steps):
        given.append((rate, steps))
        return make_schedule(config, optimizer, rate, steps)

    monkeypatch.setattr(loop, "make_schedule", watched)
    config = config_of(epochs=[1, 3, 2], rate_factors=[1, 0.5, 2], method={"lora": {"learning_rate": 1e-3, "r": 2}})
    record = run_one(config, tiny("cpu"), "lora", 0)
    assert given == [(1e-3, 3), (5e-4, 9), (2e-3, 6)]
    assert record.steps == 18
    given.clear()
    record = run_one(config_of(epochs=None, steps=[4, 1, 2]), tiny("cpu"), "lora", 0)
    assert [steps for _, steps in given] == [4, 1, 2]
    assert record.steps == 7


@pytest.mark.parametrize("name", ["epochs", "steps", "rate_factors"])
def test_numbers_for_another_number_of_tasks_are_refused(name):
    changes = {**({"epochs": None} if name == "steps" else {}), name: [1, 2]}
    with pytest.raises(ConfigError, match=f"{name} must have one number for each of 3 tasks, got 2"):
        check_methods(config_of(**changes), tiny("cpu"))


def test_settings_that_came_later_leave_earlier_runs_theirs():
    plain, other = config_of(), config_of(schedule="cosine")
    assert "schedule" not in plain.identity("lora", 0)
    assert other.identity("lora", 0)["schedule"] == "cosine"
    written = {name: value for name, value in plain.as_dict().items() if name not in ("schedule", "warmup", "own")}
    del written["rate_factors"]
    assert plain.changed(written) == []
    assert other.changed(written) == ["schedule"]
