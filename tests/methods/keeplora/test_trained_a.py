"""KeepLora with trained A: as confined as with frozen A, whatever optimizer is used, and no worse for it."""

import copy
import warnings

import pytest
import torch
from torch import nn

from keeplora import KeepLora, KeepLoraConfig
from keeplora.lora import LoraAdapter, LoraLinear, ProjectedAdamW, confine
from keeplora.tasks.classification import normalize
from keeplora.tasks.embedded import load_model, load_tasks

WIDTH = 12
SETTINGS = {"r": 2, "alpha": 6.0, "target_modules": "all-linear", "weight_energy": 0.5, "feature_energy": 0.6}


def net():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def task(seed, batches=4):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    xs = [torch.randn(32, WIDTH, generator=generator) @ mix for _ in range(batches)]
    return [(x, x[:, :3].argmax(1)) for x in xs]


def keeper_of(model=None, **changes):
    return KeepLora(model or net(), KeepLoraConfig(**{**SETTINGS, "train_a": True, **changes}))


def train(keeper, optimizer, data, steps=12):
    for step in range(steps):
        optimizer.zero_grad()
        loss_fn(keeper.model, data[step % len(data)]).backward()
        optimizer.step()


def leaks(keeper, bases):
    found = {}
    for slot in keeper.slots:
        a, q = slot.adapter.A.detach().double(), bases[slot.name].double()
        found[slot.name] = ((a @ q).norm(dim=1) / a.norm(dim=1)).max().item()
    return found


def own_adamw(keeper):
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=1e-2)
    keeper.confine(optimizer)
    return optimizer


def own_sgd(keeper):
    optimizer = torch.optim.SGD(keeper.trainable_parameters(), lr=0.1, momentum=0.9)
    keeper.confine(optimizer)
    return optimizer


OPTIMIZERS = {"keeper.optimizer": lambda keeper: keeper.optimizer(lr=1e-2), "AdamW": own_adamw, "SGD": own_sgd}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("init_b", ["zero", "gradient"])
def test_guarantees_over_four_tasks(init_b, make):
    keeper = keeper_of(init_b=init_b)
    for index in range(4):
        data = task(index)
        before = keeper.model(data[0][0])
        keeper.before_task(data, loss_fn)
        assert torch.equal(keeper.model(data[0][0]), before)  # a start that changes nothing
        bases = {slot.name: keeper.basis(slot.name) for slot in keeper.slots}
        start = {slot.name: slot.adapter.A.detach().clone() for slot in keeper.slots}
        losses = [loss_fn(keeper.model, batch).item() for batch in data]
        train(keeper, make(keeper), data, steps=24)
        assert sum(loss_fn(keeper.model, batch).item() for batch in data) < sum(losses)
        for slot in keeper.slots:
            assert (slot.adapter.A - start[slot.name]).norm() > 1e-3 * start[slot.name].norm()  # it was trained
        weights = {slot.name: slot.weight.detach().double() for slot in keeper.slots}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "after_task: the task's update must be at most")  # of a tiny net
            certificate = keeper.after_task(data)
        assert certificate.leak <= 1e-6
        for slot in keeper.slots:
            change = slot.weight.detach().double() - weights[slot.name]
            assert (change @ bases[slot.name].double()).norm() <= 1e-5 * change.norm()


def test_an_optimizer_that_was_not_confined_is_put_right_with_a_warning():
    keeper, data = keeper_of(), task(0)
    keeper.before_task(data, loss_fn)
    bases = {slot.name: keeper.basis(slot.name) for slot in keeper.slots}
    train(keeper, torch.optim.AdamW(keeper.trainable_parameters(), lr=1e-2), data)
    found = leaks(keeper, bases)
    worst = max(found, key=found.get)
    assert found[worst] > 1e-2
    exact = {
        slot.name: slot.adapter.A.detach().double()
        @ (torch.eye(WIDTH) - bases[slot.name] @ bases[slot.name].T).double()
        for slot in keeper.slots
    }
    weights = {slot.name: slot.weight.detach().double() for slot in keeper.slots}
    updates = {slot.name: slot.adapter.scaling * slot.adapter.B.detach().double() for slot in keeper.slots}
    message = rf"after_task: 3 of 3 A were trained and had left .* by {found[worst]:.1e} .*\[{worst}\].*keeper.confine"
    with pytest.warns(UserWarning, match=message):
        certificate = keeper.after_task(data)
    assert certificate.leak <= 1e-6
    for slot in keeper.slots:
        merged = weights[slot.name] + updates[slot.name] @ exact[slot.name]
        assert (slot.weight.detach().double() - merged).abs().max() <= 1e-5


def test_only_what_left_is_projected_back():
    keeper, data = keeper_of(), task(0)
    keeper.before_task(data, loss_fn)
    train(keeper, keeper.optimizer(lr=1e-2), data)
    first, *others = keeper.slots
    kept = [slot.adapter.A.detach().clone() for slot in others]
    adapters = [slot.adapter for slot in others]
    with torch.no_grad():
        first.adapter.A.add_(0.1 * keeper.basis(first.name)[:, 0])
    with pytest.warns(UserWarning, match=rf"1 of 3 A were trained and had left .*\[{first.name}\]"):
        assert keeper.after_task(data).leak <= 1e-6
    assert all(torch.equal(adapter.A, a) for adapter, a in zip(adapters, kept, strict=True))


def test_frozen_a_is_the_default_and_the_optimizer_is_adamw():
    assert not KeepLoraConfig().train_a
    keeper, data = keeper_of(train_a=False), task(0)
    other = copy.deepcopy(keeper)
    for one in (keeper, other):
        one.before_task(data, loss_fn)
        assert [p.shape for p in one.trainable_parameters()] == [slot.adapter.B.shape for slot in one.slots]
        assert not any(slot.adapter.A.requires_grad for slot in one.slots)
    train(keeper, keeper.optimizer(lr=1e-2, weight_decay=0.1), data)
    optimizer = torch.optim.AdamW(other.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    other.confine(optimizer)  # nothing to do
    train(other, optimizer, data)
    for one, two in zip(keeper.trainable_parameters(), other.trainable_parameters(), strict=True):
        assert torch.equal(one, two)


def test_goes_on_from_a_saved_open_task(tmp_path):
    model, data = net(), task(0)
    keeper = keeper_of(copy.deepcopy(model), init_b="gradient")
    keeper.before_task(data, loss_fn)
    optimizer = keeper.optimizer(lr=1e-2)
    train(keeper, optimizer, data, steps=5)
    keeper.save(tmp_path)
    loaded = KeepLora.load(tmp_path, copy.deepcopy(model))
    assert loaded.config.train_a
    assert all(slot.adapter.A.requires_grad and slot.adapter.B.requires_grad for slot in loaded.slots)
    again = loaded.optimizer()
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, stepped in ((keeper, optimizer), (loaded, again)):
        train(one, stepped, data, steps=5)
    for one, two in zip(keeper.trainable_parameters(), loaded.trainable_parameters(), strict=True):
        assert torch.equal(one, two)
    assert loaded.after_task(data, loss_fn).leak <= 1e-6


def test_optimizers_are_for_open_tasks():
    keeper = keeper_of()
    with pytest.raises(RuntimeError, match=r"a task must"):
        keeper.optimizer(lr=1e-3)
    with pytest.raises(RuntimeError, match=r"confine: a task must"):
        keeper.confine(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
    data = task(0)
    keeper.before_task(data, loss_fn)
    only_b = torch.optim.SGD([slot.adapter.B for slot in keeper.slots])
    with pytest.raises(ValueError, match=r"bases must .*got 3 of 3 for others"):
        keeper.confine(only_b)


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match=r'forward must be "auto" or "factored" with train_a'):
        KeepLoraConfig(train_a=True, forward="merged")
    with pytest.raises(TypeError, match=r"train_a must be True or False, got 1"):
        KeepLoraConfig(train_a=1)


# ---------------------------------------------------------------- on features of the shipped model


@pytest.fixture(scope="module")
def features():
    """Inputs of two layers for images of one task, and of the first for another task's: ``x, y, protected``."""
    model = load_model()
    tasks, _ = load_tasks(["digits", "letters"])
    seen = {}
    for block in (2, 4):
        layer = model.visual.transformer.resblocks[block].mlp.c_fc
        layer.register_forward_hook(lambda _, inputs, __, block=block: seen.__setitem__(block, inputs[0][:, 0]))
    with torch.no_grad():
        model.encode_image(normalize(tasks[0].train.images[:512]))
        x, y = seen[2], seen[4]
        model.encode_image(normalize(tasks[1].train.images[:512]))
    energies, vectors = torch.linalg.eigh(seen[2].double().T @ seen[2].double())
    share = energies.flip(0).cumsum(0) / energies.sum()
    k = int((share < 0.99).sum()) + 1
    return x / x.std(), y / y.std(), vectors.flip(1)[:, :k].float().contiguous()


def fit(x, y, a, q, steps=1000, *, how):
    """The loss that an adapter of rank 8 reaches when it predicts y from x, and the leak of its A."""
    layer = LoraLinear(nn.Linear(x.shape[1], y.shape[1], bias=False)).requires_grad_(False)
    layer.weight.zero_()
    layer.add_slot("weight", "weight", None)
    adapter = LoraAdapter(a, torch.zeros(y.shape[1], a.shape[0]), 1.0, train_a=True)
    layer.slots["weight"].attach(adapter)
    options = {"lr": 1e-2, "weight_decay": 0.01}
    coordinates = torch.linalg.qr(q, mode="complete").Q[:, q.shape[1] :]
    parameters, forward = [adapter.A, adapter.B], layer
    if how == "coordinates":
        c = nn.Parameter(a @ coordinates)
        parameters, x = [c, adapter.B], x @ coordinates
        forward = lambda inputs: inputs @ c.T @ adapter.B.T  # noqa: E731
    if how == "projected":
        optimizer = ProjectedAdamW(parameters, **options, bases={adapter.A: q})
    else:
        optimizer = torch.optim.AdamW(parameters, **options)
    if how == "confined":
        confine(optimizer, {adapter.A: q})
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=options["lr"], total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(forward(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
    rows = adapter.A.detach().double()
    return loss.item(), ((rows @ q.double()).norm() / rows.norm()).item()


def test_a_thousand_steps_on_real_features(features):
    """Confined to 1e-6, at the loss that coordinates of the free space reach. Adam alone leaves that space."""
    x, y, q = features
    start = torch.linalg.qr(torch.randn(x.shape[1], 8) - q @ (q.T @ torch.randn(x.shape[1], 8))).Q.T
    a = start - start @ q @ q.T
    expected, _ = fit(x, y, a, q, how="coordinates")
    zero = nn.functional.mse_loss(torch.zeros_like(y), y).item()
    for how in ("projected", "confined"):
        loss, leak = fit(x, y, a, q, how=how)
        assert leak <= 1e-6
        assert abs(loss - expected) <= 0.01 * expected
    loss, leak = fit(x, y, a, q, how="plain")
    assert leak > 1e-3
    assert expected < 0.95 * zero
