"""The forward's setting, all the way through a task: the same result either way."""

import pytest
import torch
from torch import nn

from keeplora import KeepLora, KeepLoraConfig


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def learn(steps=40, **options):
    model = net()
    torch.manual_seed(1)
    data = [(x, x[:, :4].argmax(1)) for x in torch.randn(3, 64, 16)]
    config = KeepLoraConfig(
        r=3, alpha=3.0, target_modules="all-linear", weight_energy=0.3, feature_energy=0.5, **options
    )
    keeper = KeepLora(model, config)
    keeper.before_task(data, loss_fn)
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=1e-2)
    for i in range(steps):
        optimizer.zero_grad()
        loss_fn(model, data[i % 3]).backward()
        optimizer.step()
    before = model.eval()(data[0][0]).detach()
    certificate = keeper.after_task(data)
    torch.testing.assert_close(model(data[0][0]), before, rtol=1e-4, atol=1e-4)
    plain = keeper.merge()
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks
    return before, certificate


@pytest.mark.parametrize("forward", ["auto", "merged"])
def test_either_way_learns_the_same(forward):
    expected, _ = learn(forward="factored")
    got, certificate = learn(forward=forward)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert certificate.leak <= 1e-6


def test_dropout_changes_training_only():
    expected, _ = learn()
    got, certificate = learn(dropout=0.4)
    assert not torch.allclose(got, expected, atol=1e-3)
    assert certificate.leak <= 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forward": "fast"}, "forward must be one of auto, merged, factored, got 'fast'"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": 0.1, "forward": "merged"}, "a merged weight cannot drop inputs of A alone"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        KeepLoraConfig(**options)
