"""With PEFT too: no buffer of the base model moves while a task is learned."""

import copy
import warnings

import pytest
import torch
from stock_peft import CONFIG, WIDTH, Net, loss_fn, stock, task, train
from torch import nn

import keeplora
from tests.methods.stateful import Codebook, Written


class Normed(Net):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.head(self.layer(self.blocks(x)))


class Wide(Codebook):
    def __init__(self):
        super().__init__()
        self.codes = torch.randn(4, WIDTH)


def model(layer):
    torch.manual_seed(0)
    return stock(Normed(layer))


def buffers(peft_model):
    return {name: buffer.clone() for name, buffer in peft_model.named_buffers()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("layer", [lambda: nn.BatchNorm1d(WIDTH), Wide], ids=["BatchNorm", "codebook"])
def test_buffers_stay_in_the_task_and_may_move_after_it(layer):
    peft_model = model(layer())
    before = buffers(peft_model)
    state = keeplora.initialize(peft_model, task(0), loss_fn, config=CONFIG)
    for each in (copy.deepcopy(peft_model), peft_model):
        train(each.train(), task(0))
        assert equal(buffers(each), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keeplora.update_subspace(peft_model, task(0), state).buffers == ()
    assert equal(buffers(peft_model), before)
    loss_fn(peft_model.train(), task(0)[0])
    assert not equal(buffers(peft_model), before)


def test_what_moved_all_the_same_is_put_back_and_named():
    layer = Written()
    layer.queue.rows = torch.zeros(WIDTH)
    peft_model = model(layer)
    before = buffers(peft_model)
    state = keeplora.initialize(peft_model, task(0), loss_fn, config=CONFIG)
    train(peft_model.train(), task(0))
    with pytest.warns(UserWarning, match=r"update_subspace: buffers must .*got 1 .*layer\.queue\.rows"):
        keeplora.update_subspace(peft_model, task(0), state)
    assert equal(buffers(peft_model), before)


def test_modules_that_are_trained_beside_the_adapter_may_move_and_are_named():
    peft_model = model(nn.BatchNorm1d(WIDTH))
    state = keeplora.initialize(peft_model, task(0), loss_fn, config=CONFIG, also_train=["layer"])
    train(peft_model.train(), task(0))
    assert "layer.running_mean" in keeplora.update_subspace(peft_model, task(0), state).buffers


def test_a_restored_task_keeps_them(tmp_path):
    peft_model = model(nn.BatchNorm1d(WIDTH))
    state = keeplora.initialize(peft_model, task(0), loss_fn, config=CONFIG)
    state.save(tmp_path)
    again = keeplora.SubspaceState.load(tmp_path)
    fresh = model(nn.BatchNorm1d(WIDTH))
    fresh.load_state_dict(peft_model.state_dict())
    again.restore(fresh)
    before = buffers(fresh)
    train(fresh.train(), task(0))
    assert equal(buffers(fresh), before)
    again.restore(fresh)  # a second time: one guard
    keeplora.update_subspace(fresh, task(0), again, loss_fn=loss_fn)
    assert fresh.train().base_model.model.layer.training


def test_letting_them_all_move_is_refused():
    config = keeplora.KeepLoraConfig(frozen_buffers=False)
    with pytest.raises(ValueError, match=r"config\.frozen_buffers must be True .*also_train"):
        keeplora.initialize(stock(), task(0), loss_fn, config=config)
