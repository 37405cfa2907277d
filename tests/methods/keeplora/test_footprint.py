"""The formulas of docs/memory.md, held to what is counted."""

import pytest
import torch

from bench import memory
from bench.harness import recorded_bytes
from keeplora import KeepLora, KeepLoraConfig
from keeplora.methods.keeplora.footprint import Footprint, LayerShape

HIDDEN, INNER, TASKS = 128, 192, 3


def close(counted, expected):
    assert abs(counted - expected) <= 0.1 * expected + 1e-3, (counted, expected)


def shapes_now(keeper, rank, dtype_bytes=2):
    """With the directions that there are: nothing more is added."""
    pairs, shapes = zip(keeper.slots, keeper.capacity(), strict=True), []
    for slot, room in pairs:
        already = sum(room.added_by_task)
        sizes = {"protected": room.protected - already, "already": already, "dtype_bytes": dtype_bytes}
        shapes.append(LayerShape(*slot.weight.shape, rank=rank, **sizes))
    return shapes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_moment_is_what_its_formula_says(tmp_path, dtype):
    net = memory.model(HIDDEN, INNER).to(dtype)
    before = memory.live()
    keeper = KeepLora(net, KeepLoraConfig(**{**memory.SETTINGS, "r": 8}), progress=False)
    count = memory.adapted(keeper)
    assert memory.moment(keeper, before) == {"device": 0.0, "host": 0.0}
    for number in range(TASKS):
        keeper.before_task(memory.task(number), memory.loss_fn)
        shapes = shapes_now(keeper, 8, dtype.itemsize)
        formula = Footprint(shapes)
        starts = sum(2 * shape.numbers for shape in shapes) if number and dtype == torch.bfloat16 else 0
        assert formula.starts(number) == starts
        opened = memory.moment(keeper, before)
        close(opened["device"] * count, formula.open_task())
        close(opened["host"] * count, formula.host(number))
        optimizer = memory.train(keeper, number)
        close(memory.moment(keeper, before)["device"] * count, formula.training())
        del optimizer
        keeper.after_task(memory.task(number), memory.loss_fn)
        assert memory.moment(keeper, before)["device"] < 0.01
    shapes = shapes_now(keeper, 8, dtype.itemsize)
    close(memory.moment(keeper, before)["host"] * count, Footprint(shapes).host(TASKS))
    keeper.save(tmp_path)
    close(sum(file.stat().st_size for file in tmp_path.glob("tensors-*")), Footprint(shapes).disk(TASKS))


def test_updates_beside_four_bits_are_what_their_formula_says(tmp_path):
    """Four tasks of rank 24: after three Σ r is past what the square weights' sums take."""
    net = memory.model(HIDDEN, INNER, four_bit=True)
    before = memory.live()
    settings = {**memory.SETTINGS, "r": 24, "weight_energy": 0.1, "feature_energy": 0.1}
    keeper = KeepLora(net, KeepLoraConfig(**settings), progress=False)
    count = memory.adapted(keeper)
    for number in range(4):
        keeper.before_task(memory.task(number), memory.loss_fn)
        formula = Footprint(shapes_now(keeper, 24), kept=2)
        optimizer = memory.train(keeper, number)
        held = memory.moment(keeper, before)
        close(held["device"] * count, formula.training() + formula.beside(number))
        close(held["host"] * count, formula.host(number))
        del optimizer
        keeper.after_task(memory.task(number), memory.loss_fn)
    assert all(slot.exact.total is not None for slot in keeper.slots)
    keeper.save(tmp_path)
    formula = Footprint(shapes_now(keeper, 24), kept=2)
    close(sum(file.stat().st_size for file in tmp_path.glob("tensors-*")), formula.disk(4))


@pytest.mark.filterwarnings("ignore:after_task. what one layer takes")
@pytest.mark.parametrize("budget", [2**20, 2**22, 2**24])
def test_a_switch_stays_within_its_budget_or_what_one_layer_takes(budget):
    net = memory.model(HIDDEN, INNER)
    settings = {**memory.SETTINGS, "r": 8, "memory_budget": budget}
    keeper = KeepLora(net, KeepLoraConfig(**settings), progress=False)
    data = memory.task(0)
    keeper.before_task(data, memory.loss_fn)
    memory.train(keeper, 0)
    shapes = [LayerShape(*slot.weight.shape, rank=8, protected=0) for slot in keeper.slots]
    activations, _ = recorded_bytes(torch.no_grad()(memory.loss_fn), net, data[0])
    before = sum(memory.on_host(keeper).values())
    peak, _ = recorded_bytes(keeper.after_task, data, memory.loss_fn)
    grown = sum(memory.on_host(keeper).values()) - before
    assert peak - grown - activations <= Footprint(shapes).switch(budget)
