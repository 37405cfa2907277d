"""Published settings by name, and directions from gradients as the public LLaVA code takes them."""

import copy

import pytest
import torch
from torch import nn

from keeplora import KeepLora, KeepLoraConfig
from keeplora.methods.keeplora.config import PRESETS
from keeplora.methods.settings import ConfigError

# METHOD: (r, scale, weight energy by tower, depth scale by tower, dropout, feature source)
PUBLISHED = {
    "mtil": (16, 1 / 16, {"vision": 0.85, "text": 0.2}, {"vision": 0.2, "text": 1.0}, 0.0, "inputs"),
    "parity": (16, 1 / 16, {"vision": 0.85, "text": 0.2}, {"vision": 1.0, "text": 1.0}, 0.0, "inputs"),
    "mllm_dcl": (64, 2.0, {"language": 0.6}, {"language": 0.2}, 0.05, "gradients"),
    "ucit": (32, 0.25, {"language": 0.6}, {"language": 0.2}, 0.05, "gradients"),
    "cl_vista": (64, 2.0, {"language": 0.6}, {"language": 0.2}, 0.05, "gradients"),
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_what_was_published(name):
    config = KeepLoraConfig.preset(name)
    r, scale, weight_energy, depth_scale, dropout, source = PUBLISHED[name]
    assert (config.r, config.scaling, config.dropout, config.feature_source) == (r, scale, dropout, source)
    assert set(config.towers) == set(weight_energy)
    for tower in weight_energy:
        assert config.weight_energy_of(tower) == weight_energy[tower]
        assert config.depth_scale_of(tower) == depth_scale[tower]
        assert config.feature_energy_of(tower) == 0.99
    assert KeepLoraConfig(**config.to_dict()).scaling == scale


def test_presets_take_changes_and_other_names_are_refused():
    assert KeepLoraConfig.preset("ucit", r=8).scaling == 1.0  # alpha stays
    with pytest.raises(ConfigError, match=r"name must .*got 'mtli'.*mtil"):
        KeepLoraConfig.preset("mtli")


def test_without_alpha_the_scale_is_one_at_every_rank():
    assert KeepLoraConfig(r=3).scaling == KeepLoraConfig(r=64).scaling == 1.0
    assert KeepLoraConfig(r=4, rslora=True).scaling == 2.0


WIDTH = 12
SETTINGS = {
    "r": 2, "target_modules": "all-linear", "weight_energy": 0.0, "feature_energy": 0.9, "feature_source": "gradients",
}  # fmt: skip


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 6))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def task():
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(16, WIDTH, generator=generator) for _ in range(3)]
    return [(x, x[:, :6].argmax(1)) for x in xs]


def learned(**changes):
    keeper, data = KeepLora(net(), KeepLoraConfig(**SETTINGS, **changes)), task()
    keeper.before_task(data, loss_fn)
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=1e-2)
    for batch in data:
        loss_fn(keeper.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    keeper.after_task(data)
    bases = [keeper.basis(name).double() for name in ("0", "2")]
    return bases, mean_gradients(copy.deepcopy(keeper.merge()).double().requires_grad_(True), data)


def mean_gradients(model, data):
    total = sum(loss_fn(model, (x.double(), y)) for x, y in data) / len(data)
    return torch.autograd.grad(total, [model[0].weight, model[2].weight])


def test_directions_from_gradients_are_the_leading_rows_of_the_learned_models_mean_gradient():
    for q, g in zip(*learned(), strict=True):
        _, s, vh = torch.linalg.svd(g)
        shares = s.square().cumsum(0) / s.square().sum()
        count = int((shares < 0.9).sum()) + 1
        assert q.shape[1] == count > 0
        torch.testing.assert_close(q @ q.T, vh[:count].T @ vh[:count], atol=1e-4, rtol=0)


def test_sketched_gradients_give_directions_of_their_row_space():
    (_, q), (_, g) = learned(gradient_statistic="sketch")
    rows = torch.linalg.svd(g, full_matrices=False).Vh
    assert 0 < q.shape[1] <= len(rows) < WIDTH
    torch.testing.assert_close(rows.T @ (rows @ q), q, atol=1e-4, rtol=0)


def test_a_statistic_of_inputs_does_not_go_with_gradients():
    with pytest.raises(ConfigError, match=r"feature_statistic.*'slot_mean'"):
        KeepLoraConfig(feature_source="gradients", feature_statistic="slot_mean")
