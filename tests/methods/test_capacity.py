"""Capacity: what is protected, free and added, and how many more tasks fit. Checked against what then happens."""

import copy
import json
import re

import pytest
import torch
from torch import nn

from keeplora import Capacity, KeepLora, KeepLoraConfig, LayerCapacity, StateError
from keeplora.methods.capacity import forecast

WIDTH = 24


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def task_in(columns, seed=0):
    """Inputs of one task, in these columns alone."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(64, WIDTH)
    x[:, columns] = torch.randn(64, len(columns), generator=generator)
    return [(x, torch.randint(5, (64,), generator=generator))]


def keeper_of(model=None, r=3):
    model = model or nn.Sequential(nn.Linear(WIDTH, 5))
    settings = {"r": r, "target_modules": "all-linear", "weight_energy": 0.0, "feature_energy": 1.0}
    return KeepLora(model, KeepLoraConfig(**settings))


def learn(keeper, data):
    keeper.before_task(data, loss_fn)
    for parameter in keeper.trainable_parameters():
        parameter.data.normal_(std=0.01)
    keeper.after_task(data)


def row(name="a", free=10, more=None, added=0, tower="vision", depth=0, width=20):
    return LayerCapacity(name, tower, depth, width, width - free, free, added, more, (added,))


def simulate(free, r, added):
    """Tasks that find r free directions, if each takes ``added`` of those that are left."""
    tasks = 0
    while free >= r:
        tasks, free = tasks + 1, max(0, free - added)
    return tasks


def test_forecast_counts_the_tasks_that_find_room():
    for free in range(12):
        for r in range(1, 6):
            for added in range(1, 5):
                assert forecast(free, r, added) == simulate(free, r, added), (free, r, added)
    assert forecast(5, 5, 0) is None
    assert forecast(4, 5, 0) == 0


def test_the_forecast_comes_true_for_tasks_of_one_kind():
    keeper = keeper_of()
    learn(keeper, task_in(range(4)))
    [layer] = keeper.capacity()
    assert (layer.protected, layer.free, layer.added, layer.forecast) == (4, 20, 4, 5)
    for done in range(1, 6):  # every task brings four new directions
        assert keeper.capacity().forecast == 6 - done
        learn(keeper, task_in(range(4 * done, 4 * done + 4)))
    [layer] = keeper.capacity()
    assert (layer.free, layer.forecast, layer.added_by_task) == (0, 0, (4,) * 6)


def test_a_full_layer_is_skipped_and_the_others_go_on():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = nn.Linear(4, 5), nn.Linear(WIDTH, 5)

        def forward(self, x):
            return self.narrow(x[:, :4]) + self.wide(x)

    keeper = keeper_of(Two())
    learn(keeper, task_in(range(8), seed=1))
    capacity = keeper.capacity()
    assert [layer.forecast for layer in capacity] == [0, 2]
    assert capacity.forecast == 0
    assert [layer.name for layer in capacity.tightest(1)] == ["narrow"]
    weight = keeper.model.narrow.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"1 of 2 layers .*: narrow"):
        learn(keeper, task_in(range(12), seed=2))
    assert torch.equal(keeper.model.narrow.weight, weight)
    assert [layer.added_by_task for layer in keeper.capacity()] == [(4, 0), (8, 4)]


def test_before_the_first_task_nothing_is_forecast():
    capacity = keeper_of().capacity()
    assert capacity.forecast is None
    assert capacity.median_forecast is None
    assert str(capacity).splitlines()[0] == (
        "capacity before the first task: 100% of the space of 1 layers is free; nothing suggests a limit yet"
    )
    assert "fill first" not in str(capacity)


def test_the_model_holds_as_many_as_its_tightest_layer():
    layers = [row("a", more=7), row("b", more=2), row("c"), row("d", more=9), row("e", more=3)]
    capacity = Capacity(tuple(layers), 1)
    assert (capacity.forecast, capacity.median_forecast) == (2, 7)
    assert [layer.name for layer in capacity.tightest()] == ["b", "e", "a"]
    assert Capacity((row("a", more=2), row("b"), row("c")), 1).median_forecast is None
    assert capacity[1:3] == tuple(layers[1:3])
    assert len(capacity) == 5


def test_the_table_is_aligned_and_summarises_blocks():
    layers = (
        row("v.0.q", free=10, more=2, added=5),
        row("v.0.k", free=2, more=0, added=5),
        row("t.11.q", free=15, tower="text", depth=11, added=0),
    )
    lines = str(Capacity(layers, 3)).splitlines()
    assert lines[0] == (
        "capacity after task 3: 45% of the space of 3 layers is free, 1 layer has less than r directions left; "
        "room for 0 more tasks like the last in every layer, 2 in half of them"
    )
    cells = [re.split(r"\s{2,}", line) for line in lines[1:4]]
    assert cells[0] == ["tower", "depth", "layers", "protected", "added", "free", "least free", "more tasks"]
    assert cells[1] == ["vision", "0", "2", "70%", "25%", "30%", "2", "0"]
    assert cells[2] == ["text", "11", "1", "25%", "0%", "75%", "15", "no limit"]
    assert len({len(line) for line in lines[1:4]}) == 1
    assert lines[4] == (
        "fill first: v.0.k (2 of 20 free, 0), v.0.q (10 of 20 free, 2), t.11.q (15 of 20 free, no limit)"
    )


def test_json_and_back():
    keeper = keeper_of()
    learn(keeper, task_in(range(4)))
    capacity = keeper.capacity()
    plain = json.loads(json.dumps(capacity.to_dict()))
    assert plain["forecast"] == 5
    assert plain["free_share"] == pytest.approx(20 / 24, rel=1e-12)
    assert Capacity.of_rows(plain["layers"], plain["tasks"]) == capacity
    short = [{key: value for key, value in plain["layers"][0].items() if key != "forecast"}]
    with pytest.raises(ValueError, match=r"of_rows: rows must have .*forecast.*, got added, added_by_task, depth"):
        Capacity.of_rows(short, 1)


def test_states_remember_what_each_task_added(tmp_path):
    model = nn.Sequential(nn.Linear(WIDTH, 5))
    start = copy.deepcopy(model)
    keeper = keeper_of(model, r=2)
    learn(keeper, task_in(range(4)))
    learn(keeper, task_in(range(6)))
    keeper.save(tmp_path)
    loaded = KeepLora.load(tmp_path, copy.deepcopy(start))
    assert loaded.capacity() == keeper.capacity()
    assert loaded.capacity()[0].added_by_task == (4, 2)


@pytest.mark.parametrize("wrong", [[[4, 2], [4, 2]], []])
def test_a_history_of_other_layers_is_refused(wrong):
    keeper = keeper_of()
    learn(keeper, task_in(range(4)))
    state = keeper.state()
    state.meta["added_by_task"] = wrong
    with pytest.raises(
        StateError,
        match=f"added_by_task must have a row of 1 numbers for each of 1 targets, got {re.escape(str(wrong))}",
    ):
        keeper.load_state(state)


def test_the_forecast_counts_tasks_whose_gradient_lies_in_free_space():
    """Directions that are left do not help where the gradient is not: 1 of 400 parts of its energy is wanted."""
    assert forecast(60, 4, 0, share=0.5) is None
    assert forecast(60, 4, 0, share=0.0024) == forecast(60, 4, 1, share=0.0) == 0
    for free in (10, 40):
        for added in (1, 7):
            for share in (0.0026, 0.004, 0.3, 1.0):
                count, left = 0, free
                while left >= 4 and share * left / (free + added) >= 0.0025 * (1 - 1e-12):
                    count, left = count + 1, left - added
                assert forecast(free, 4, added, share) == count, (free, added, share)


def low_rank_task(seed, classes=5):
    """Inputs that share four directions with every other task, and little beside them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, WIDTH, generator=generator) * 1e-3
    x[:, :4] += torch.randn(64, 4, generator=generator)
    return [(x, torch.randint(classes, (64,), generator=generator))]


def test_no_room_is_promised_where_nothing_can_be_learned():
    """The second task finds its gradient where the first one's inputs are, though 20 of 24 directions are free."""
    model = nn.Sequential(nn.Linear(WIDTH, 5))
    settings = {"r": 3, "target_modules": "all-linear", "weight_energy": 0.0, "feature_energy": 0.999}
    keeper = KeepLora(model, KeepLoraConfig(**settings))
    learn(keeper, low_rank_task(0))
    assert keeper.capacity().forecast == 5
    keeper.before_task(low_rank_task(1), loss_fn)
    assert keeper.capacity().forecast == 5  # of the task that was learned
    keeper.after_task(low_rank_task(1))
    [layer] = keeper.capacity()
    assert (layer.free, layer.added, layer.forecast) == (20, 0, 0)
    weight = model[0].weight.requires_grad_(True)
    [gradient] = torch.autograd.grad(loss_fn(model, low_rank_task(1)[0]), weight)
    q = keeper.basis("0")
    assert layer.share == pytest.approx(1 - float((gradient @ q).norm() / gradient.norm()) ** 2, abs=1e-6)
    assert "1 layer has next to nothing of the gradient there" in keeper.capacity().summary


@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_the_share_of_a_known_gradient(kind):
    """Inputs in four columns of equal size, two of which are protected: half of the gradient is free."""
    model = nn.Sequential(nn.Linear(WIDTH, 64, bias=False))
    config = KeepLoraConfig(
        r=1, target_modules="all-linear", weight_energy=0.0, feature_energy=1.0, gradient_statistic=kind
    )
    keeper = KeepLora(model, config)

    def half(columns):
        return [(torch.eye(WIDTH)[columns] * 2.0,)]

    def by_hand(model, batch):
        return (model(batch[0]) * torch.eye(64)[: len(batch[0])]).sum()  # its gradient is δᵀ x with δ of rank 4

    keeper.before_task(half([0, 1]), by_hand)
    assert keeper.capacity()[0].share is None
    keeper.after_task(half([0, 1]))
    assert keeper.capacity()[0].share == pytest.approx(1.0)
    keeper.before_task(half([0, 1, 2, 3]), by_hand)
    keeper.after_task(half([0, 1, 2, 3]))
    assert keeper.capacity()[0].share == pytest.approx(0.5, abs=1e-6)


def test_shares_live_through_states_and_abandoned_tasks(tmp_path):
    model = nn.Sequential(nn.Linear(WIDTH, 5))
    start = copy.deepcopy(model)
    keeper = keeper_of(model)
    learn(keeper, task_in(range(4)))
    learn(keeper, task_in(range(2, 8), seed=1))
    share = keeper.capacity()[0].share
    assert 0 < share < 1
    keeper.before_task(task_in(range(6, 12), seed=2), loss_fn)
    keeper.save(tmp_path)
    open_one = KeepLora.load(tmp_path, copy.deepcopy(start))
    assert open_one.capacity() == keeper.capacity()
    for one in (keeper, open_one):
        one.after_task(task_in(range(6, 12), seed=2), loss_fn)
    assert open_one.capacity() == keeper.capacity()
    assert keeper.capacity()[0].share not in (None, share)
    now = keeper.capacity()
    keeper.before_task(task_in(range(4)), loss_fn)
    keeper.abandon_task()
    assert keeper.capacity() == now


@pytest.mark.parametrize("wrong", [None, [[0.5]], [[1.5, None]], [["a", None]], [[float("nan"), None]], []])
def test_shares_that_are_none_are_refused(wrong):
    keeper = keeper_of()
    learn(keeper, task_in(range(4)))
    state = keeper.state()
    state.meta["free_shares"] = wrong
    with pytest.raises(StateError, match="free_shares must have two numbers"):
        keeper.load_state(state)


def test_eight_layers_of_tasks_in_random_subspaces():
    """Directions are free in every layer and few are added, yet the gradient is where earlier inputs are."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.Tanh())))
    settings = {"r": 1, "target_modules": "all-linear", "weight_energy": 0.0, "feature_energy": 0.999}
    keeper = KeepLora(model, KeepLoraConfig(**settings), progress=False)

    def square(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q[:12]
        task = [(torch.randn(128, 12, generator=generator) @ turn, torch.randn(128, 32, generator=generator))]
        keeper.before_task(task, square)
        keeper.after_task(task)
    capacity = keeper.capacity()
    assert capacity.median_forecast == 0
    roomy = [layer for layer in capacity if layer.free >= 1]
    assert len(roomy) >= 4
    assert all(layer.forecast == 0 for layer in roomy if layer.share < 0.0025)
