"""The whole loop inside autocast, which keeps the half-precision copies it makes of trained weights until it ends."""

import pytest
import torch
from torch import nn

from keeplora import KeepLora, KeepLoraConfig
from keeplora.methods import METHODS
from tests.methods.contract import Net, loss_fn, make, steps, task

BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def squares(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_forward_sees_the_last_step(name):
    torch.manual_seed(0)
    method, data = make(name, Net()), task(0)
    with torch.autocast(**BF16):
        method.before_task(data, loss_fn)
        if method.trains:
            steps(method, method.optimizer(lr=5e-2), data, 4)
        method.model.eval()
        inside = loss_fn(method.model, data[0])
    with torch.autocast(**BF16):  # which has no copies yet
        outside = loss_fn(method.model, data[0])
        method.after_task(data)
    assert torch.equal(inside, outside)


SETTINGS = [
    {"train_a": True},
    {"train_a": True, "dropout": 0.1},
    {"feature_statistic": "slot_mean"},
    {"feature_statistic": "sketch", "sketch_share": 0.5},
    {"gradient_statistic": "sketch", "r": 1},
    {"init_b": "gradient"},
    {"forward": "factored"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_is_promised_holds_inside_as_outside(settings):
    """With a loop that never calls after_step, as a user's own may."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 16))
    config = {"r": 2, "target_modules": "all-linear", "weight_energy": 0.3, "feature_energy": 0.5, **settings}
    keeper, data = KeepLora(model, KeepLoraConfig(**config)), [torch.randn(8, 24) for _ in range(2)]
    with torch.autocast(**BF16):
        for _ in range(2):
            keeper.before_task(data, squares)
            optimizer = keeper.optimizer(lr=5e-2)
            for batch in data * 2:
                squares(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            inside = squares(model.eval(), data[0])
            with torch.autocast("cpu", enabled=False), torch.no_grad():
                exact = squares(model, data[0])
            certificate = keeper.after_task(data)
            model.train()
            assert certificate.leak <= 1e-6
            assert certificate.orthogonality <= 1e-5
            torch.testing.assert_close(inside.float(), exact, rtol=0.02, atol=0.0)  # bfloat16 in two layers
