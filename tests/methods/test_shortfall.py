"""A basis that holds less of the features than was asked for is named, by every method that extends one."""

import warnings

import pytest
import torch
from torch import nn

from keeplora import KeepLora, KeepLoraConfig
from keeplora.math.lowrank import Extension
from keeplora.methods import create
from keeplora.methods.gpm import GpmConfig
from keeplora.methods.shortfall import warn_of_shortfall

SKETCHED = {"r": 2, "target_modules": ("0", "2"), "weight_energy": 0.0, "feature_statistic": "sketch"}


def loss_fn(model, batch):
    return model(batch).square().mean()


def one_task(share):
    """A wide layer on inputs of full rank, then one on inputs of rank 2."""
    model = nn.Sequential(nn.Linear(48, 2), nn.Linear(2, 24), nn.Linear(24, 3))
    keeper = KeepLora(model, KeepLoraConfig(**SKETCHED, feature_energy=0.95, sketch_share=share))
    task = [torch.randn(64, 48) for _ in range(3)]
    keeper.before_task(task, loss_fn)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        return keeper.after_task(task), [str(warning.message) for warning in told]


def test_a_sketch_that_is_too_narrow_is_told_once_with_the_layers_it_is_too_narrow_for():
    certificate, told = one_task(0.25)
    captured = {layer.name: layer.captured for layer in certificate.layers}
    assert captured["0"] < 0.9
    assert captured["2"] > 0.95
    (message,) = told
    assert f"{captured['0']:.3f} of 0.95" in message
    assert "1 of 2" in message
    assert "worst: 0." in message
    assert "sketch_share, 0.25" in message


def test_a_sketch_that_is_wide_enough_says_nothing():
    certificate, told = one_task(1.0)
    assert min(layer.captured for layer in certificate.layers) > 0.95 - 1e-5
    assert told == []


def settings(name, energy):
    return {"target_modules": "all-linear", "feature_energy": energy, **({} if name == "gpm" else {"r": 2})}


@pytest.mark.parametrize("name", ["keeplora", "gpm", "inflora", "duallora"])
@pytest.mark.parametrize("energy", [0.5, 1.0])
def test_exact_statistics_reach_every_share(name, energy):
    """All of it, too: what rounding leaves of directions that are none is not missed."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 3))
    method = create(name, model, settings(name, energy))
    task = [torch.randn(16, 8) @ torch.randn(8, 48) for _ in range(3)]
    method.before_task(task, loss_fn)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        method.after_task(task, loss_fn)
    assert [str(warning.message) for warning in told if "feature_energy" in str(warning.message)] == []


@pytest.mark.parametrize(
    ("name", "module"),
    [("gpm", "gpm"), ("duallora", "duallora.method"), ("keeplora", "keeplora.protected"), ("inflora", "inflora")],
)
def test_every_method_that_extends_bases_looks_at_what_they_hold(name, module, monkeypatch):
    """Whatever the reason: here none is extended."""
    monkeypatch.setattr(
        f"keeplora.methods.{module}.extend_basis",
        lambda q, c, energy: [
            Extension(b, 0, 0.25 * float(m.trace()), float(m.trace())) for b, m in zip(q, c, strict=True)
        ],
    )
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    method = create(name, model, settings(name, 0.5))
    task = [torch.randn(16, 12) for _ in range(3)]
    method.before_task(task, loss_fn)
    with pytest.warns(UserWarning, match=r"feature_energy .*2 of 2, 0\.250 of 0\.5 .*0, 2"):
        method.after_task(task, loss_fn)


def test_nothing_is_missed_of_what_is_not_there():
    none = Extension(torch.zeros(8, 0), 0, 0.0, 0.0)
    rounded = Extension(torch.zeros(8, 1), 1, 1 - 5e-7, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_shortfall(GpmConfig(), ["a", "b"], [none, rounded], [0.9, 1.0])
        warn_of_shortfall(GpmConfig(), [], [], [])
    with pytest.warns(UserWarning, match="0.999 of 1 in the worst: b"):
        warn_of_shortfall(GpmConfig(), ["a", "b"], [none, Extension(torch.zeros(8, 1), 1, 0.999, 1.0)], [0.9, 1.0])
