"""What the forecasts of GPM, InfLoRA and KeepLoRA rest on: the share of a task that lies in free space."""

import copy
import warnings

import pytest
import torch
from torch import nn

from keeplora import StateError
from keeplora.methods import create
from keeplora.methods.capacity import forecast

WIDTH = 24


def square(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def fits(method, tasks, rate, momentum):
    """Of every task, the share of its loss that training takes away."""
    results = []
    for data in tasks:
        with warnings.catch_warnings(action="ignore"):  # of adapters below r
            method.before_task(data, square)
        before = square(method.model, data[0]).item()
        optimizer = method.optimizer(lr=rate, **momentum)
        for _ in range(25):
            square(method.model, data[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(1 - square(method.model, data[0]).item() / before)
        method.after_task(data)
    return results


@pytest.fixture(scope="module")
def eight_layers():
    """A net of 96 inputs, and tasks that share a mean and lie in random subspaces of 24 dimensions beside it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(96, 96), nn.Tanh())))
    tasks = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(96, 24, generator=generator)).Q
        x = 1 + 0.01 * torch.randn(64, 24, generator=generator) @ turn.T
        y = 0.5 * torch.randn(96, generator=generator)
        tasks.append([(x, torch.tanh(y + 0.01 * x @ torch.randn(96, 96, generator=generator)))])
    return model, tasks


ENERGY = {"feature_energy": 0.9999, "target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("name", "settings", "rate", "momentum", "promised"),
    [
        ("keeplora", {"r": 8, "weight_energy": 0.0, "balance": False}, 5e-3, {}, 88),
        ("inflora", {"r": 8}, 5e-3, {}, 88),
        ("gpm", {}, 0.5, {"momentum": 0.9}, 95),
    ],
)
def test_there_is_no_room_for_88_more_tasks_where_lora_fits_and_this_does_not(
    eight_layers, name, settings, rate, momentum, promised
):
    model, tasks = eight_layers
    plain = create("lora", copy.deepcopy(model), {"r": 8, "target_modules": "all-linear"})
    assert min(fits(plain, tasks, 5e-3, {})) > 0.95
    method = create(name, copy.deepcopy(model), {**ENERGY, **settings}, progress=False)
    assert fits(method, tasks[:1], rate, momentum)[0] > 0.5
    assert method.capacity().forecast == promised  # while tasks can be learned
    assert fits(method, tasks[1:], rate, momentum)[0] < 0.04
    capacity = method.capacity()
    assert capacity.forecast == capacity.median_forecast == 0
    assert max(layer.share for layer in capacity) < 1e-3
    by_directions = [forecast(layer.free, 1, layer.added) for layer in capacity]
    assert max(87 if count is None else count for count in by_directions) >= 87  # what their number alone says


def test_gpm_looks_at_the_first_gradient_of_a_task():
    """Inputs in four columns of equal size, two of which are protected; then others, which do not count."""
    model = nn.Sequential(nn.Linear(WIDTH, 64, bias=False))
    method = create("gpm", model, {"feature_energy": 1.0, "target_modules": "all-linear"})

    def run(columns):
        x = torch.eye(WIDTH)[columns]
        (method.model(x) * torch.eye(64)[: len(x)]).sum().backward()

    def of(columns):
        return [(torch.eye(WIDTH)[columns], torch.zeros(len(columns), 64))]

    method.before_task(of([0, 1]), square)
    (method.model(torch.eye(WIDTH)[:2]) * 0.0).sum().backward()  # nothing
    (method.model(torch.eye(WIDTH)[:2]) * torch.inf).sum().backward()  # as a scaler's first step
    run([0, 1])
    assert method.capacity()[0].share is None  # of the last task, of which there is none
    method.after_task(of([0, 1]))
    assert method.capacity()[0].share == 1.0
    method.before_task(of([0, 1, 2, 3]), square)
    run([0, 1, 2, 3])
    run([0, 1])
    run([4])
    method.after_task(of([0, 1, 2, 3]))
    assert method.capacity()[0].share == pytest.approx(0.5, abs=1e-6)
    method.before_task(of([5]), square)
    run([5])
    method.abandon_task()
    assert method.capacity()[0].share == pytest.approx(0.5, abs=1e-6)
    method.before_task(of([5]), square)  # which nobody trains
    method.after_task(of([5]))
    assert method.capacity()[0].share is None


@pytest.mark.parametrize("first", [4, 16])  # more than half is protected: the complement is kept
def test_inflora_looks_at_the_inputs(first):
    method = create(
        "inflora", nn.Sequential(nn.Linear(WIDTH, 5)),
        {"r": 2, "feature_energy": 1.0, "final_energy": 1.0, "target_modules": "all-linear"},
    )  # fmt: skip

    def of(columns):
        return [(torch.eye(WIDTH)[columns], torch.zeros(len(columns), 5))]

    for columns, share in ((range(first), 1.0), (range(first - 3, first + 1), 0.25), (range(2), 0.0)):
        method.before_task(of(list(columns)), square)
        method.after_task(of(list(columns)))
        assert method.capacity()[0].share == pytest.approx(share, abs=1e-6)
    assert method.capacity().forecast == 0


@pytest.mark.parametrize("name", ["gpm", "inflora"])
@pytest.mark.parametrize("wrong", [None, [[0.5]], [[1.5, None]], []])
def test_shares_of_other_methods_that_are_none_are_refused(name, wrong):
    method = create(
        name,
        nn.Sequential(nn.Linear(WIDTH, 5)),
        {"target_modules": "all-linear"} | ({"r": 2} if name == "inflora" else {}),
    )
    state = method.state()
    state.meta["free_shares"] = wrong
    with pytest.raises(StateError, match="free_shares must have two numbers"):
        method.load_state(state)
