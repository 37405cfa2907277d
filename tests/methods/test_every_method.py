"""The contract every registered method keeps. A new method is covered the moment it is registered."""

import copy
import dataclasses
import sys

import pytest
import torch
from torch import nn

from keeplora.lora import linear_targets, peft_checkpoint
from keeplora.math import extend_basis
from keeplora.methods import METHODS, create, load
from keeplora.methods.lora_method import LoraMethod
from tests.methods.contract import (
    LOOKS_AFTER,
    LOOKS_BEFORE,
    SMALL,
    WIDTH,
    Batch,
    Net,
    learn,
    loss_fn,
    make,
    one_class_loss,
    one_rank,
    scores,
    task,
)


@pytest.fixture(params=sorted(METHODS))
def name(request):
    return request.param


def test_starts_from_the_unchanged_function(name):
    model, x = Net(), torch.randn(2, 4, WIDTH)
    before = model(x)
    method = make(name, model)
    assert method.model is model
    assert torch.equal(model(x), before)
    method.before_task(task(0), loss_fn)
    assert torch.equal(model(x), before)


def test_only_declared_parameters_change(name):
    method = make(name)
    method.before_task(task(0), loss_fn)
    declared = {id(p) for p in method.trainable_parameters()}
    assert {id(p) for p in method.model.parameters() if p.requires_grad} == declared or not method.trains
    others = {n: p.detach().clone() for n, p in method.model.named_parameters() if id(p) not in declared}
    if method.trains:
        optimizer = torch.optim.SGD(method.trainable_parameters(), lr=0.1)
        loss_fn(method.model, task(0)[0]).backward()
        optimizer.step()
    now = dict(method.model.named_parameters())
    assert all(torch.equal(now[n], value) for n, value in others.items())


def test_learns_something_unless_it_never_trains(name):
    method, x = make(name), torch.randn(2, 4, WIDTH)
    before = method.model(x)
    learn(method, task(0))
    assert torch.equal(method.model(x), before) is not method.trains


def test_targets_and_progress_are_taken_or_refused(name, capfd):
    config = METHODS[name].config
    if name != "lines" and not any(f.name == "target_modules" for f in dataclasses.fields(config)):
        with pytest.raises(ValueError, match="targets must be None, got list"):
            create(name, Net(), targets=linear_targets(Net())[:1])
        return
    chosen = linear_targets(Net())[1:4]
    method = create(name, Net(), SMALL.get(name), targets=chosen, progress=True)
    assert [slot.name for slot in getattr(method, "base", method).slots] == [
        "attn.k_proj",
        "attn.v_proj",
        "attn.out_proj",
    ]
    learn(method, task(0))
    if name in LOOKS_BEFORE | LOOKS_AFTER:
        assert "batch" in capfd.readouterr().err


def test_what_was_learned_is_exported_or_refused(name, tmp_path):
    method = make(name)
    weights = [slot.weight.detach().clone() for slot in getattr(method, "slots", ())]
    learn(method, task(0))
    if not isinstance(method, LoraMethod):
        assert not hasattr(method, "export_peft")
        return
    if name in NOT_EXPORTED:
        with pytest.raises(RuntimeError, match="export_peft: "):
            method.export_peft(tmp_path)
        assert not list(tmp_path.iterdir())
        return
    with pytest.warns(UserWarning, match="out_proj twice"):
        method.export_peft(tmp_path)
    updates = peft_checkpoint.split(method.slots, peft_checkpoint.read(tmp_path))
    for slot, before in zip(method.slots, weights, strict=True):
        update = updates[slot.name]
        change = update.scaling * update.b.double() @ update.a.double()
        torch.testing.assert_close(before.double() + change, slot.weight.double(), rtol=0, atol=1e-6)


NOT_EXPORTED = {
    "gpm": "weights are trained as a whole",
    "keeplora++cls": "classifiers stand beside the weights",
    "duallora": "what it adds depends on the sample",
    "osf": "weights are trained nearly as a whole",
}


def test_two_runs_agree(name):
    start, x = Net(), torch.randn(2, 4, WIDTH)
    outputs = []
    for _ in range(2):
        method = make(name, copy.deepcopy(start))
        learn(method, task(0))
        learn(method, task(1))
        outputs.append(method.model(x))
    assert torch.equal(*outputs)


def test_batches_of_one_and_rank_one(name):
    method, x = create(name, Net(), one_rank(name)), torch.randn(1, 4, WIDTH)
    before = method.model(x)
    for _ in range(2):
        learn(method, [Batch(torch.randn(1, 4, WIDTH), torch.tensor([2]))])
    after = method.model.eval()(x)
    assert torch.isfinite(after).all()
    assert torch.equal(after, before) is not method.trains


def test_a_task_of_one_class(name):
    method, data = make(name), [Batch(x, torch.zeros_like(y)) for x, y in task(0)]
    for _ in range(2):
        learn(method, data, loss_fn=one_class_loss)
    assert all(torch.isfinite(p).all() for p in method.model.parameters())
    assert torch.isfinite(scores(method.model.eval(), data[0].images, classes=1)).all()


def test_a_model_without_linear_layers_is_refused_by_what_adapts_them(name):
    config = METHODS[name].config
    if name == "lines" or not any(f.name == "target_modules" for f in dataclasses.fields(config)):
        pytest.skip("it has no layers to choose")
    if name == "keeplora++cls":
        pytest.skip("it asks for image features before it asks for layers")
    with pytest.raises(ValueError, match=r"create: targets must .*got a model without"):
        make(name, nn.Sequential(nn.Conv1d(4, 4, 1), nn.Flatten()))


def test_what_is_no_model_and_what_are_no_settings_is_refused(name):
    with pytest.raises(TypeError, match=r"create: model must be a torch.nn.Module, got str\. Load the model"):
        create(name, "a/model")
    method = make(name)
    with pytest.raises(TypeError, match=r"config must be a \w+, got builtins.dict\. Make one"):
        type(method)(method.base if name == "lines" else Net(), {"r": 4})
    with pytest.raises(TypeError, match=r"load: model must be a torch.nn.Module, got str"):
        load(Net(), "folder")  # swapped


def test_a_rank_that_no_layer_can_hold_is_refused_before_any_training(name):
    settings = dict(SMALL.get(name, {}))
    if "r" not in settings:
        pytest.skip("it has no rank")
    with pytest.raises(ValueError, match=r"r must be at most .*8.* Lower r"):
        create(name, Net(), {**settings, "r": WIDTH + 1})


def test_a_merged_model_is_made_of_plain_layers_and_computes_the_same(name):
    method, x = make(name), torch.randn(2, 4, WIDTH)
    learn(method, task(0))
    learned = method.model(x)
    if not method.merges:
        with pytest.raises(RuntimeError, match="computes more than the pretrained model"):
            method.merge()
        return
    kinds = [type(module) for module in Net().modules()]
    model = method.merge()
    assert model is method.model
    assert [type(module) for module in model.modules()] == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert set(model.state_dict()) == set(Net().state_dict())
    torch.testing.assert_close(model(x), learned, rtol=1e-5, atol=1e-6)


def test_unknown_names_offer_the_nearest():
    with pytest.raises(ValueError, match=r"name must .*got 'keplora'. Nearest names: keeplora"):
        create("keplora", Net())
    with pytest.raises(ValueError, match=r"method 'keeplora' do not include 'alfa'.* Nearest names: alpha"):
        create("keeplora", Net(), {"alfa": 3})
    with pytest.raises(ValueError, match="do not include 'lr'"):
        create("zero-shot", Net(), {"lr": 1})


@pytest.mark.parametrize("settings", [{"r": 0}, {"r": True}, {"alpha": -1.0}])
def test_lora_refuses_bad_settings(settings):
    with pytest.raises(ValueError, match="LoraConfig: "):
        create("lora", Net(), settings)


def test_a_switch_extends_the_bases_of_all_layers_of_a_shape_in_one_call(name, monkeypatch):
    calls = []

    def counted(bases, *args, **options):
        calls.append(len(bases))
        return extend_basis(bases, *args, **options)

    monkeypatch.setattr("keeplora.math.batch.batched", lambda tensor: True)  # as on a GPU
    users = [m for n, m in [*sys.modules.items()] if n.startswith("keeplora.methods") and hasattr(m, "extend_basis")]
    assert len(users) >= 4
    for module in users:
        if not module.__name__.endswith("calibration"):  # of a task as a whole: it has one basis
            monkeypatch.setattr(module, "extend_basis", counted)
    method = make(name)
    for seed in range(3):
        learn(method, task(seed))
    assert len(calls) in (0, 3)
    assert not calls or min(calls) > 1
