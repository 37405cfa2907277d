"""The method of docs/add-a-method.md, as printed there: it keeps its own promise, and the contract of all methods."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from small_net import loss_fn, net, task, train, weights

from keeplora.methods import METHODS, create
from tests.methods import contract, test_every_life, test_every_method

PAGE = Path(__file__).parents[2] / "docs" / "add-a-method.md"
GIVEN = {"name", "tasks", "reloaded", "tmp_path"}
PROMISES = [
    check
    for module in (test_every_method, test_every_life)
    for name, check in vars(module).items()
    if name.startswith("test_") and {"name"} <= set(inspect.signature(check).parameters) <= GIVEN
]  # fmt: skip


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The page's code has run; what it registers is gone again after the test."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    monkeypatch.delitem(METHODS, "apart", raising=False)
    before = set(METHODS)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "__page__"})
    assert set(METHODS) - before == {"apart"}
    monkeypatch.setitem(contract.SMALL, "apart", {"r": 2})
    yield
    del METHODS["apart"]


def test_tasks_write_to_outputs_of_their_own():
    method = create("apart", net(), {"r": 1, "target_modules": "all-linear"})
    changes = []
    for t in range(3):
        before = weights(method)
        method.before_task(task(t), loss_fn)
        train(method, task(t))
        method.after_task(task(t))
        changes.append([now - then for now, then in zip(weights(method), before, strict=True)])
    for t in range(1, 3):
        for old, new in zip(changes[t - 1], changes[t], strict=True):
            assert abs(new).max() > 1e-3
            assert abs(old.T @ new).max() <= 1e-6 * abs(old).max() * abs(new).max() * len(old)
    assert [used.shape[1] for used in method.used] == [3, 3]
    method.before_task(task(3), loss_fn)  # the last layer has three outputs: none is left there
    assert [slot.adapter is None for slot in method.slots] == [False, True]
    method.after_task(task(3))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda check: check.__name__)
def test_the_contract(promise, tmp_path):
    assert len(PROMISES) > 20
    torch.manual_seed(0)
    given = {"name": "apart", "tasks": 1, "reloaded": True, "tmp_path": tmp_path}
    promise(**{name: given[name] for name in inspect.signature(promise).parameters})
