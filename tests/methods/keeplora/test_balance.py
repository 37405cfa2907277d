"""`balance`: A is shortened where the task's inputs are strong along it."""

import copy

import pytest
import stock_peft
import torch
from torch import nn

import keeplora
from keeplora import KeepLora, KeepLoraConfig
from keeplora.lora import linear_targets, wrap
from keeplora.methods.settings import ConfigError
from keeplora.statistics.input_sample import InputSample
from keeplora.statistics.passes import observing

WIDTH = 12
SETTINGS = {"r": 3, "target_modules": "all-linear", "weight_energy": 0.2, "feature_energy": 0.5, "depth_scale": 1.0}


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 6))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Counted(list):
    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def task(seed=0):
    """Inputs that are far stronger along a few directions than along the others."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q * 0.5 ** torch.arange(WIDTH)[:, None]
    xs = [torch.randn(16, WIDTH, generator=generator) @ (6 * turn) for _ in range(3)]
    return Counted((x, (x @ turn.T).abs()[:, :6].argmax(1)) for x in xs)


def opened(model=None, **changes):
    keeper, data = KeepLora(model or net(), KeepLoraConfig(**{**SETTINGS, **changes})), task()
    keeper.before_task(data, loss_fn)
    return keeper, data


@pytest.mark.parametrize("statistic", ["exact", "sketch"])
def test_a_is_that_of_the_plain_start_by_the_law_from_the_same_pass(statistic):
    model = net().double()
    (plain, one), (keeper, other) = (
        opened(balance=False, gradient_statistic=statistic),
        opened(gradient_statistic=statistic),
    )
    assert one.passes == other.passes
    x = torch.cat([batch[0] for batch in one]).double()
    shortened = 0
    for slot, balanced_slot, inputs in zip(plain.slots, keeper.slots, (x, model[:2](x).detach()), strict=True):
        a = slot.adapter.A.detach().double()
        c = inputs.T @ inputs
        e = ((a @ c) * a).sum(1) / (c.trace() / WIDTH)
        expected = a / max(1.0, float(e.mean())) ** 0.5
        torch.testing.assert_close(balanced_slot.adapter.A.detach().double(), expected, atol=1e-5, rtol=1e-4)
        assert (keeper.basis(slot.name).double().T @ expected.T).abs().max() < 1e-6
        shortened += int(e.mean() > 1.5)
    assert shortened


def test_the_function_starts_unchanged_and_the_certificate_holds():
    model, x = net(), torch.randn(5, WIDTH)
    before = model(x)
    keeper, data = opened(model)
    assert torch.equal(keeper.model(x), before)
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=1e-2)
    for batch in data:
        loss_fn(keeper.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert keeper.after_task(data).leak < 1e-6


def sample_of(x, mask=None):
    model = nn.Sequential(nn.Linear(WIDTH, 4))
    slots = wrap(model, linear_targets(model))
    sample = InputSample(slots, mask)
    with observing(sample.hosts, sample), torch.no_grad():
        for part in x:
            model(part)
    return sample


def test_energies_do_not_depend_on_the_size_of_inputs_or_of_a():
    x, a = torch.randn(3, 20, WIDTH) * torch.linspace(0.1, 4, WIDTH), torch.randn(5, WIDTH)
    (e,) = sample_of(x).energies([a])
    torch.testing.assert_close(sample_of(1e6 * x).energies([1e-3 * a])[0], e, rtol=1e-5, atol=0)
    identity = sample_of(x).energies([torch.eye(WIDTH)])[0]
    assert identity.mean() == pytest.approx(1)
    assert identity[-1] > 100 * identity[0]


def test_padding_is_not_sampled_and_long_passes_are_bounded():
    x = torch.randn(2, 30, WIDTH)
    padded = torch.cat([x, torch.full((2, 10, WIDTH), 50.0)], dim=1)
    counts = torch.arange(40).expand(2, 40) < 30
    kept = sample_of([padded], lambda slot, x: counts).kept
    assert all(part.abs().max() < 50 for parts in kept.values() for part in parts)
    (rows,) = sample_of(torch.randn(40, 100, WIDTH)).kept.values()
    assert 256 <= sum(map(len, rows)) < 256 + 64


def test_processes_add_up_their_samples():
    x, a = torch.randn(2, 20, WIDTH) * torch.linspace(0.1, 4, WIDTH), torch.randn(5, WIDTH)

    class Process:
        """It is asked whether it has failed before anything is added, which would be waited for."""

        def __init__(self, add):
            self.calls, self.adding = [], add

        def gather(self, value):
            self.calls.append("gather")
            return [value]

        def add(self, tensor):
            self.calls.append("add")
            self.adding(tensor)

    def add_the_second_half(tensor):
        theirs = []
        sample_of(x[1:]).energies([a], Process(lambda sums: theirs.append(sums.clone())))
        tensor += theirs[0]

    first = Process(add_the_second_half)
    torch.testing.assert_close(sample_of(x[:1]).energies([a], first), sample_of(x).energies([a]))
    assert first.calls == ["gather", "add"]


def test_layers_without_inputs_stay_as_they_are():
    assert sample_of([]).energies([torch.randn(2, WIDTH)])[0].tolist() == [1.0, 1.0]


def test_without_a_pass_it_is_refused():
    with pytest.raises(ConfigError, match=r"balance must .*got True"):
        KeepLoraConfig(directions="random", balance=True)
    assert not KeepLoraConfig(directions="random").balances


def test_stock_peft_starts_with_the_same_rows():
    plain = stock_peft.net()
    config = {"weight_energy": 0.2, "feature_energy": 0.5, "depth_scale": 1.0}
    data = stock_peft.task(0)
    keeper = KeepLora(copy.deepcopy(plain), KeepLoraConfig(r=4, alpha=8.0, target_modules=["up", "down"], **config))
    keeper.before_task(data, stock_peft.loss_fn)
    model = stock_peft.stock(plain)
    keeplora.initialize(model, data, stock_peft.loss_fn, config=KeepLoraConfig(**config))
    for slot in keeper.slots:
        stock = model.get_submodule(f"base_model.model.{slot.name}").lora_A["default"].weight
        torch.testing.assert_close(stock.detach(), slot.adapter.A.detach(), atol=1e-5, rtol=1e-4)
        assert slot.adapter.A.norm(dim=1).min() < 0.95
