"""Passes put together: parts of one, several as one; what joint methods and validation see of them in the loop."""

from collections import Counter
from typing import ClassVar

import pytest
import tiny_workload
import torch

from keeplora.methods import METHODS
from keeplora.methods.lora import SequentialLora
from keeplora.methods.registry import Registered
from keeplora.train.batches import Union
from keeplora.train.config import parse_config
from keeplora.train.loop import run_one


def test_a_union_yields_every_batch_once_in_an_order_the_seed_decides():
    passes = [["a0", "a1", "a2", "a3"], ["b0", "b1"], [], ["d0", "d1", "d2"]]
    orders = {tuple(Union(passes, seed)) for seed in range(8)}
    assert len(orders) > 1
    for order in orders:
        assert Counter(order) == Counter(x for batches in passes for x in batches)
        assert [x for x in order if x[0] == "a"] == passes[0]  # each pass in its own order
    assert tuple(Union(passes, 3)) == tuple(Union(passes, 3))
    assert len(Union(passes, 0)) == 9


def config_of(**changes):
    return parse_config(
        {
            "benchmark": "tiny_workload:workload", "methods": ["zero-shot"], "batch_size": 16, "workers": 0,
            "precision": "fp32", "tensorboard": False, **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("length", "steps"), [({"epochs": 2}, [6, 12, 18]), ({"steps": 4}, [4, 8, 12]), ({"steps": [4, 6, 5]}, [4, 10, 15])]
)
def test_a_joint_method_trains_on_all_tasks_so_far(length, steps):
    workload = tiny_workload.workload("cpu")
    owner = {task.tokens: i for i, task in enumerate(workload._tasks)}
    seen = []
    plain = workload.loss

    def loss(model, batch):
        if torch.is_grad_enabled():
            seen.append(next(i for tokens, i in owner.items() if tokens is batch.tokens))
        return plain(model, batch)

    workload.loss = loss
    record = run_one(config_of(**length), workload, "joint", 0)
    assert record.steps == sum(steps) == len(seen)
    begin = 0
    for task, count in enumerate(steps):
        assert set(seen[begin : begin + count]) == set(range(task + 1))
        begin += count


class Validating(SequentialLora):
    """Asks for the validation score when it opens and when it closes a task."""

    scores: ClassVar[list[list[float]]] = []

    def open_task(self, loader, loss_fn):
        assert self.validate is not None
        self.scores.append([self.validate()])
        super().open_task(loader, loss_fn)

    def close_task(self, loader, loss_fn):
        self.scores[-1].append(self.validate())
        return super().close_task(loader, loss_fn)


def test_validation_is_the_mean_over_the_tasks_so_far(monkeypatch):
    entry = METHODS["lora"]
    monkeypatch.setitem(METHODS, "validating", Registered(Validating, entry.config, {"r": 2}))
    Validating.scores.clear()
    workload, asked = tiny_workload.workload("cpu"), []
    plain = workload.accuracy

    def accuracy(model, task, split, size):
        assert not model.training
        asked.append((task, split))
        return plain(model, task, split, size)

    workload.accuracy = accuracy
    config = config_of(steps=2, methods=["validating"], evaluate_on="validation")
    record = run_one(config, workload, "validating", 0)
    assert [split for _, split in asked] == ["validation"] * len(asked)
    for i, (before, after) in enumerate(Validating.scores):
        assert after == pytest.approx(sum(record.accuracy[i][: i + 1]) / (i + 1))  # merging changes no answer
        if i:
            assert before == pytest.approx(sum(record.accuracy[i - 1][: i + 1]) / (i + 1))
