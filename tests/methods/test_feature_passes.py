"""Methods that look at features obey ``memory_budget``: several passes give, bit for bit, what one gives."""

import logging

import pytest
import torch
from torch import nn

from keeplora.methods import METHODS, create
from keeplora.methods.settings import ConfigError
from keeplora.statistics.budget import COPIES

WIDTH, INNER = 16, 24
LAYER = (1 + COPIES) * 4 * INNER**2
"""The widest layer's moment and the work on it."""
SETTINGS = {
    "gpm": {"feature_energy": 0.5},
    "inflora": {"r": 2, "feature_energy": 0.5, "tasks": 4},
    "loda": {"r": 2},
    "corda": {"r": 2},
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        x = x + torch.tanh(self.q(x) * self.k(x))
        return x + self.down(torch.relu(self.up(x)))


def squares(model, batch):
    return model(batch).square().mean()


class Counted(list):
    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def learned(name, budget):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    method = create(name, model, SETTINGS[name] | {"target_modules": "all-linear", "memory_budget": budget})
    passes = []
    for seed in range(2):
        data = Counted(torch.randn(3, 8, 5, WIDTH, generator=torch.Generator().manual_seed(seed)))
        method.before_task(data, squares)
        opened = data.passes
        optimizer = method.optimizer(lr=1e-2)
        squares(model, data[0]).backward()
        optimizer.step()
        method.after_task(data)
        passes.append((opened, data.passes - opened))
    return method, passes


def test_the_methods_with_a_budget_for_features_are_these():
    budgeted = {name for name, entry in METHODS.items() if hasattr(entry.config, "memory_budget")}
    assert {name for name in budgeted if "keeplora" not in name} == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_several_passes_learn_what_one_learns(name, caplog):
    one, single = learned(name, None)
    with caplog.at_level(logging.INFO, "keeplora"):
        many, passes = learned(name, LAYER)
    assert all(after > 2 for _, after in passes)  # and one that looks at who reads what
    assert all((before > 2) == (alone[0] > 0) for (before, _), alone in zip(passes, single, strict=True))
    assert f"memory_budget {LAYER / 2**20:.1f} MiB" in caplog.text
    expected, found = one.state().tensors, many.state().tensors
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_layer_that_does_not_fit_is_named_with_the_call_and_a_remedy_the_method_has():
    with pytest.warns(UserWarning, match="memory_budget") as told:
        learned("inflora", LAYER - 1)
    texts = [str(warning.message) for warning in told if "0.down" in str(warning.message)]
    assert {text.split(":")[0] for text in texts} == {"before_task", "after_task"}
    assert not any("feature_statistic" in text for text in texts)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_budget_that_is_no_number_of_bytes_is_refused(name):
    with pytest.raises(ConfigError, match="memory_budget"):
        create(name, nn.Sequential(Block()), SETTINGS[name] | {"target_modules": "all-linear", "memory_budget": -1})
