"""Layers that no batch of a task reaches: every method closes the task, leaves them alone, and names them once."""

import copy
import dataclasses
import warnings

import pytest
import stock_peft
import torch
from families import members
from torch import nn

from keeplora import KeepLora, KeepLoraConfig, initialize, update_subspace
from keeplora.lora import linear_targets, wrap
from keeplora.methods import METHODS, create
from keeplora.methods.inflora import DualBasis, extended
from keeplora.statistics import mean_gradients
from tests.methods.contract import LOOKS_AFTER, LOOKS_BEFORE, SMALL, WIDTH, Net, loss_fn, make, same, steps, task

ALL = frozenset({"idle", "expert"})


class Towers(Net):
    """The contract's net with a tower of its own and an expert: what of them runs can be told."""

    def __init__(self):
        super().__init__()
        self.idle, self.expert = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.reach = ALL

    def forward(self, x):
        y = super().forward(x)
        if "idle" in self.reach:
            y = y + self.idle(x).mean(1)
        routed = x.flatten(0, 1)[:: 2 if "expert" in self.reach else x.numel()]
        routed = routed[: len(routed) if "expert" in self.reach else 0]  # no token at all
        return y + self.expert(routed).sum(0)


@pytest.fixture(params=sorted(METHODS))
def name(request):
    return request.param


def adapts(name):
    return name == "lines" or any(f.name == "target_modules" for f in dataclasses.fields(METHODS[name].config))


def made(name, reach=frozenset()):
    torch.manual_seed(0)
    model = Towers()
    model.reach = frozenset(reach)
    if not adapts(name):
        return make(name, model)
    settings = copy.deepcopy(SMALL.get(name, {}))
    settings.get("settings", settings)["target_modules"] = "all-linear"
    return create(name, model, settings)


def learn(method, data):
    method.before_task(data, loss_fn)
    if method.trains:
        optimizer = method.optimizer(lr=1e-2, weight_decay=0.0)  # which would move what no gradient reaches
        steps(method, optimizer, data, 4)
    return method.after_task(data)


def told(caught, function):
    """The layers that warnings of this function name."""
    texts = [str(w.message) for w in caught if "no batch of the task reached" in str(w.message)]
    return [text.split("layers: ")[1].split(". ")[0] for text in texts if text.startswith(function)]


def recorded(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return caught


def slots_of(method):
    return {slot.name: slot for slot in getattr(getattr(method, "base", method), "slots", [])}


def test_they_stay_as_they_are_and_are_named_once(name, tmp_path):
    method = made(name)
    weights = {n: p.detach().clone() for n, p in method.model.named_parameters() if n.startswith(("idle", "expert"))}
    caught = recorded(lambda: learn(method, task(0)))
    looks = [f for f, those in (("before_task", LOOKS_BEFORE), ("after_task", LOOKS_AFTER)) if name in those][:1]
    assert told(caught, "") == ["idle, expert"] * len(looks)
    assert all(told(caught, function) for function in looks)
    assert not [w for w in caught if "idle" in str(w.message) and "weight_energy" in str(w.message)]
    assert all(torch.equal(p, weights[n]) for n, p in method.model.named_parameters() if n in weights)
    capacity = method.capacity()
    if capacity is not None:
        added = {layer.name: layer.added for layer in capacity}
        assert added["idle"] == added["expert"] == 0 < max(added.values())
    method.save(tmp_path)
    again = made(name)
    again.load_state(method.state())
    assert same(again.state(), method.state())
    if method.merges:
        x = torch.randn(2, 4, WIDTH)
        before = method.model.eval()(x)
        assert torch.equal(method.merge()(x), before)


def test_the_next_task_may_reach_them(name):
    method = made(name)
    recorded(lambda: learn(method, task(0)))
    method.model.reach = ALL
    before = {n: p.detach().clone() for n, p in method.model.named_parameters()}
    assert not told(recorded(lambda: learn(method, task(1))), "")
    if method.trains and method.merges:
        assert not torch.equal(method.model.idle.weight, before["idle.weight"])
    assert all(torch.isfinite(p).all() for p in method.model.parameters())


def test_a_task_may_stop_reaching_them(name):
    """What was protected there, as a basis or as its complement, stays to the last bit."""
    method = made(name, ALL)
    for seed in range(2):
        recorded(lambda seed=seed: learn(method, task(seed)))
    kept = {key: t.clone() for key, t in method.state().tensors.items() if key.startswith(("idle", "expert"))}
    method.model.reach = frozenset()
    recorded(lambda: learn(method, task(2)))
    now = method.state().tensors
    for key, tensor in kept.items():
        if ".basis" in key or key.endswith((".moment", ".weight")):
            assert torch.equal(now[key], tensor), key


@pytest.mark.parametrize("first", [True, False])
def test_one_pass_reaches_them_and_the_other_does_not(name, first):
    method = made(name, ALL if first else ())
    recorded(lambda: learn(method, task(1)))
    before = method.model.idle.weight.detach().clone()
    caught = recorded(lambda: method.before_task(task(0), loss_fn))
    if method.trains:
        loss_fn(method.model, task(0)[0]).backward()
        with torch.no_grad():
            for parameter in method.trainable_parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    whole = None
    if name == "loda" and first:
        adapter = slots_of(method)["idle"].adapter
        whole = before + adapter.scaling * adapter.update().detach() @ adapter.A
    method.model.reach = frozenset() if first else ALL
    caught += recorded(lambda: method.after_task(task(0)))
    expected = ["after_task"] if first and name in LOOKS_AFTER else []
    expected += ["before_task"] if not first and name in LOOKS_BEFORE else []
    assert [str(w.message).split(":")[0] for w in caught if "no batch" in str(w.message)] == expected
    if first and method.trains and method.merges:
        assert not torch.equal(method.model.idle.weight, before)  # what was learned is kept
    if whole is not None:  # all of it: no features say how to recalibrate it
        torch.testing.assert_close(method.model.idle.weight, whole)
    capacity = method.capacity()
    if capacity is not None:
        added = {layer.name: layer.added for layer in capacity}
        assert (added["idle"] == 0) is first


def test_an_abandoned_task_leaves_no_trace(name):
    method = made(name)
    state = method.state()
    recorded(lambda: method.before_task(task(0), loss_fn))
    method.abandon_task()
    assert same(state, method.state())


def test_a_complement_stays_as_it_is_too():
    basis = DualBasis(torch.linalg.qr(torch.randn(8, 3)).Q, free=True)
    [same_basis] = extended([basis], [torch.zeros(8, 8)], 0.9)
    assert torch.equal(same_basis.columns, basis.columns)


def squares(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize(
    "settings", [{}, {"feature_statistic": "sketch", "sketch_share": 1.0}, {"gradient_statistic": "sketch", "r": 1}]
)
def test_every_statistic_knows_of_layers_without_inputs(settings):
    class First(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    config = KeepLoraConfig(**{"r": 2, "target_modules": "all-linear", "feature_energy": 0.5, **settings})
    keeper = KeepLora(First(nn.Linear(8, 8), nn.Linear(8, 16)), config)
    data = [torch.randn(6, 8)] * 2
    caught = recorded(lambda: keeper.before_task(data, squares))
    assert told(caught, "before_task") == ["1"]
    basis = keeper.basis("1")
    assert not recorded(lambda: keeper.after_task(data))
    assert torch.equal(keeper.basis("1"), basis)
    assert not torch.equal(keeper.basis("0"), basis)


def test_the_advice_fits_the_cause():
    """No batch, no gradient, no room: three causes, one warning each."""

    class Causes(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.silent, self.full, self.good = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            return self.good(x) + self.full(x) + self.silent(x).detach()

    keeper = KeepLora(Causes(), KeepLoraConfig(r=1, target_modules="all-linear", weight_energy=0.3, feature_energy=0))
    keeper._protected = [  # full has no free direction
        dataclasses.replace(p, parts=(torch.eye(4),) if slot.name == "full" else p.parts)
        for slot, p in zip(keeper.slots, keeper._protected_or_weights(), strict=True)
    ]
    texts = [str(w.message) for w in recorded(lambda: keeper.before_task([torch.randn(9, 4)], squares))]
    advice = {"idle": "loss_fn runs their part", "silent": "the loss depends on", "full": "Lower weight_energy"}
    for name, remedy in advice.items():
        [text] = [text for text in texts if f": {name}." in text]
        assert remedy in text
    assert len(texts) == 3


def test_batches_that_reach_no_adapted_layer_count_with_a_gradient_of_zero():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

        def forward(self, batch):
            return getattr(self, batch[0])(batch[1])

    model = Either()
    slots = wrap(model, linear_targets(model)[:1])
    x = torch.randn(5, 4)
    reached = set()
    [both] = mean_gradients(model, slots, [("text", x), ("image", x)], squares, reached=reached)
    [alone] = mean_gradients(model, slots, [("image", x)], squares)
    torch.testing.assert_close(both, alone / 2)
    assert reached == {"image"}
    with pytest.raises(RuntimeError, match="got no gradient to any of them"):
        mean_gradients(model, slots, [("text", x)], squares)
    with pytest.raises(RuntimeError, match="got no gradient to any of them"):  # at once: the layer is called
        mean_gradients(model, slots, [("image", x)], lambda m, b: squares(m, b).detach())


def test_a_task_of_images_alone():
    model, (data, _) = members.fresh("clip")
    keeper = KeepLora(model, members.CONFIG)

    def images_alone(model, batch):
        return model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output.square().mean()

    [text] = told(recorded(lambda: keeper.before_task(data, images_alone)), "before_task")
    assert "text_model" in text
    assert "vision" not in text
    keeper.after_task(data)
    assert all((layer.added > 0) is (layer.tower == "vision") for layer in keeper.capacity())
    keeper.merge()


def test_on_peft():
    class Skipping(stock_peft.Block):
        def forward(self, x):
            return x + nn.functional.pad(self.up(x).relu(), (0, 0))[..., : x.shape[-1]]

    net = stock_peft.net()
    net.blocks[1].__class__ = Skipping
    model, data = stock_peft.stock(net), stock_peft.task(0)
    states = []
    caught = recorded(lambda: states.append(initialize(model, data, stock_peft.loss_fn, config=stock_peft.CONFIG)))
    assert told(caught, "initialize") == ["blocks.1.down"]
    assert len(caught) == 1
    [state] = states
    basis = state.bases["blocks.1.down"].clone()
    stock_peft.train(model, data)
    assert not recorded(lambda: update_subspace(model, data, state))
    assert torch.equal(state.bases["blocks.1.down"], basis)
    net.blocks[1].__class__ = stock_peft.Block
    recorded(lambda: initialize(model, data, stock_peft.loss_fn, state))
    net.blocks[1].__class__ = Skipping
    caught = recorded(lambda: update_subspace(model, data, state))
    assert told(caught, "update_subspace") == ["blocks.1.down"]
