"""Feature statistics within a budget: in several passes, with the numbers of one."""

import copy
import logging

import pytest
import torch
from torch import nn

from keeplora import KeepLora, KeepLoraConfig
from keeplora.lora import linear_targets, wrap
from keeplora.statistics import ALONE
from keeplora.statistics.budget import COPIES, feature_groups

WIDTH, INNER = 16, 24


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x):
        x = x + torch.tanh(self.q(x) * self.k(x)) + self.v(x)
        return x + self.down(torch.relu(self.up(x)))


def net():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def task(seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 5, WIDTH, generator=draw) for _ in range(3)]


def squares(model, batch):
    return model(batch).square().mean()


SQUARE, WIDE = 4 * WIDTH**2, 4 * INNER**2
WORK = COPIES * WIDE
ALL = 2 * (2 * SQUARE + WIDE) + WORK
"""Two blocks of three distinct inputs, and room for the work of the widest layer."""


@pytest.mark.parametrize(
    ("budget", "groups"),
    [
        (None, [range(10)]),
        (8 * SQUARE + 2 * WIDE + WORK, [range(10)]),  # all fit, even if each of q, k and v had its own: nobody looks
        (ALL, [range(10)]),
        (ALL - 1, [range(9), [9]]),
        (2 * SQUARE + WIDE + WORK, [range(5), range(5, 10)]),
        (WIDE + WORK, [[0, 1, 2, 3], [4], [5, 6, 7, 8], [9]]),
    ],
)
def test_layers_that_fit_are_looked_at_together(budget, groups, caplog):
    model = net()
    slots = wrap(model, linear_targets(model))
    with caplog.at_level(logging.INFO, "keeplora"):
        found = feature_groups(model, slots, task(0), squares, memory_budget=budget, peers=ALONE)
    assert found == [list(group) for group in groups]
    assert ("passes over the data" in caplog.text) == (len(groups) > 1 or budget == ALL)


def learned(budget, loader=list):
    model = net()
    config = KeepLoraConfig(
        r=2, target_modules="all-linear", feature_energy=0.6, memory_budget=budget, gradient_statistic="exact"
    )
    keeper = KeepLora(model, config)
    reports = []
    for seed in range(2):
        keeper.before_task(task(seed), squares)
        with torch.no_grad():
            for parameter in keeper.trainable_parameters():
                parameter.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
        reports.append(keeper.after_task(loader(task(seed))))
    return keeper, reports


def test_several_passes_find_what_one_finds():
    one, reports = learned(None)
    for budget in (ALL - 1, WIDE + WORK):
        other, theirs = learned(budget)
        assert theirs == reports
        assert all(torch.equal(one.basis(s.name), other.basis(s.name)) for s in one.slots)


def test_a_loader_that_runs_once_is_said_and_used_once():
    with pytest.warns(UserWarning, match="can be iterated once"):
        _, reports = learned(ALL - 1, loader=iter)
    assert reports == learned(None)[1]


def test_a_layer_that_does_not_fit_alone_is_named():
    with pytest.warns(UserWarning, match=r"memory_budget, .* \[0\.down\]"):
        _, reports = learned(WIDE + WORK - 1)
    assert reports == learned(None)[1]


def test_layers_that_nothing_reaches_are_no_error_where_others_are_reached():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    keeper = KeepLora(Two(), KeepLoraConfig(r=2, target_modules="all-linear", memory_budget=(1 + COPIES) * 4 * 64))
    data = [torch.randn(9, 8)]
    with pytest.warns(UserWarning, match="idle"):
        keeper.before_task(data, squares)
    assert keeper.after_task(data).leak < 1e-6
    keeper.before_task(data, squares)
    before = copy.deepcopy(keeper.state())
    with pytest.raises(ValueError, match="none in all 2"):
        keeper.after_task(data, lambda model, batch: batch.sum())
    assert all(torch.equal(t, before.tensors[n]) for n, t in keeper.state().tensors.items())
