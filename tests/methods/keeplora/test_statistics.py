"""How KeepLora gathers a task's gradient: exactly or sketched, from all of the data or a part."""

import pytest
import torch
from torch import nn

from keeplora import KeepLora, KeepLoraConfig
from keeplora.statistics import mean_gradients


def test_sketched_gradients_find_nearly_the_same_directions():
    """Energy of the gradient in the adapter's rows, beside what exact gradients give; the rest of the task works."""
    captured = {}
    for statistic in ("exact", "sketch"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 40))
        truth = torch.randn(24, 40)
        data = [(x, (x @ truth).argmax(1)) for x in torch.randn(4, 32, 24) * torch.arange(1, 25) ** -1.0]

        def loss_fn(model, batch):
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        config = KeepLoraConfig(r=2, target_modules="all-linear", feature_energy=0.5, gradient_statistic=statistic)
        keeper = KeepLora(model, config)
        gradients = mean_gradients(model, keeper.slots, data, loss_fn)
        keeper.before_task(data, loss_fn)
        captured[statistic] = [
            ((g @ slot.adapter.A.T).norm() / g.norm()).item() for g, slot in zip(gradients, keeper.slots, strict=True)
        ]
        assert keeper.after_task(data).leak <= 1e-6
    for exact, sketched in zip(captured["exact"], captured["sketch"], strict=True):
        assert exact * 0.995 <= sketched <= exact * (1 + 1e-5)


@pytest.mark.parametrize("init_b", ["zero", "gradient"])
def test_some_layers_sketched_and_some_exact(init_b):
    """The second pass gathers what the sketched ones need, and leaves the others alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 40))
    data = [(torch.randn(32, 24), torch.randint(40, (32,))) for _ in range(3)]

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    before = model(data[0][0]).detach()
    config = KeepLoraConfig(
        r=2,
        target_modules="all-linear",
        feature_energy=0.5,
        gradient_statistic="sketch",
        init_b=init_b,
        weight_energy=0.5,
    )
    keeper = KeepLora(model, config)
    keeper.before_task(data, loss_fn)
    torch.testing.assert_close(model(data[0][0]), before, rtol=1e-5, atol=1e-6)
    assert [slot.adapter.rank for slot in keeper.slots] == [2, 2, 2]
    assert keeper.after_task(data).leak <= 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_statistic": "dense"}, "gradient_statistic must be one of auto, exact, sketch, got 'dense'"),
        ({"data_fraction": 0.0}, r"data_fraction must lie in \(0, 1\], got 0.0"),
        ({"memory_budget": -1}, "memory_budget .*got -1"),
    ],
)
def test_gradient_settings_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        KeepLoraConfig(**options)


def test_sketched_features_protect_what_they_promise():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))
    data = [(x, x[:, :5].argmax(1)) for x in torch.randn(4, 64, 32) * torch.arange(1, 33) ** -1.5]

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    config = KeepLoraConfig(
        r=2, target_modules="all-linear", weight_energy=0.0, feature_energy=0.8,
        feature_statistic="sketch", sketch_share=0.5,
    )  # fmt: skip
    keeper = KeepLora(model, config)
    keeper.before_task(data, loss_fn)
    report = keeper.after_task(data)
    x = torch.cat([batch[0] for batch in data]).double()
    q = keeper.basis(keeper.slots[0].name).double()
    assert report.layers[0].captured >= 0.8 - 1e-5
    assert (x @ q).square().sum() / x.square().sum() >= report.layers[0].captured - 1e-5
