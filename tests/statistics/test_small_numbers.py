"""Numbers whose squares or products leave float32's range: statistics are right, refused, or said to miss some."""

import warnings

import pytest
import torch
from torch import nn

from keeplora import KeepLora, KeepLoraConfig
from keeplora.lora import linear_targets, wrap
from keeplora.methods import create
from keeplora.methods.duallora.calibration import ImageFeatures, TaskCalibration
from keeplora.ops import gram
from keeplora.ops.gram import energy_of
from keeplora.statistics import feature_statistics, features, mean_gradients

WIDTH = 6
KINDS = ["second_moment", "slot_mean", "sketch"]
EXACT = {"rel": 1e-6, "abs": 0}


def layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2))
    return model, wrap(model, linear_targets(model))


def forward(model, batch):
    return model(batch)


def said(call):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in told]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power", [-140, -83, -55, 0, 50, 83])
def test_the_energy_is_right_whatever_the_size(power, dtype):
    x = (torch.randn(33, 5) * 2.0**power).to(dtype)
    c, energy = gram(x)
    exact = x.double().square().sum().item()
    assert energy.item() == pytest.approx(exact, **EXACT)
    assert energy_of(x).item() == pytest.approx(exact, rel=1e-12, abs=0)
    if abs(power) < 60:
        assert c.trace().item() == pytest.approx(exact, rel=1e-5, abs=0)
    else:  # what the energy is to be compared with
        assert c.trace().item() == (0.0 if power < 0 else torch.inf)


def test_a_batch_among_others_is_right_too():
    x = torch.randn(9, 5)
    c, energy = gram(x * 2.0**-83)
    gram(x, out=c, energy=energy)
    assert energy.item() == pytest.approx(x.double().square().sum().item(), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-25, 1e-20])
def test_small_features_are_named_once_with_their_size(kind, size):
    model, slots = layers()
    data = [size * torch.randn(4, 3, WIDTH) for _ in range(2)]
    (first, second), told = said(lambda: feature_statistics(model, slots, data, forward, kind=kind, sketch_share=0.5))
    (message,) = told
    assert "[0]" in message
    assert "1 of the second moments" in message
    squares = sum(data).div(2).flatten(0, 1) if kind == "slot_mean" else torch.cat(data)
    assert first.energy == pytest.approx(squares.double().square().sum().item(), rel=1e-5, abs=0)
    assert f"{(first.energy / squares.numel()) ** 0.5:.1e}" in message
    assert second.energy > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-15, 0.0, 1e15])
def test_of_features_that_float32_holds_nothing_is_said(kind, size):
    """Of zeros neither: there is nothing to miss."""
    model, slots = layers()
    data = [size * torch.randn(4, 3, WIDTH) for _ in range(2)]
    (first, _), told = said(lambda: feature_statistics(model, slots, data, forward, kind=kind, sketch_share=1.0))
    assert told == []
    moment = first.moment if kind != "sketch" else first.moment.factor @ first.moment.factor.T
    assert moment.double().trace().item() == pytest.approx(first.energy, rel=1e-3, abs=0)


@pytest.mark.parametrize("kind", KINDS)
def test_large_features_are_refused_by_name_and_size(kind):
    model, slots = layers()
    data = [torch.full((4, 3, WIDTH), 1e25) for _ in range(2)]
    with pytest.raises(ValueError, match=r"^feature_statistics: features must .*float32.*got 1\.0e\+25.*\[0\]"):
        feature_statistics(model, slots[:1], data, lambda m, x: m[0](x), kind=kind)


def test_where_nothing_may_wait_energies_are_exact_until_they_are_known_to_be_ordinary(monkeypatch):
    """As on a GPU, where quick_energy cannot look."""
    model, slots = layers()
    exact = []
    monkeypatch.setattr(features, "_looked_at", lambda rows: False)
    monkeypatch.setattr(features, "gram", lambda rows: (rows.T @ rows, rows.square().sum(dtype=torch.float64)))
    monkeypatch.setattr(features, "energy_of", lambda rows: (exact.append(rows.shape), energy_of(rows))[1])
    data = [torch.randn(3, WIDTH) for _ in range(3)]
    _, told = said(lambda: feature_statistics(model, slots, data, forward))
    assert (len(exact), told) == (2, [])  # the first batch of two layers
    exact.clear()
    (first, _), told = said(lambda: feature_statistics(model, slots, [x * 2.0**-83 for x in data], forward))
    assert len(exact) == 4
    assert len(told) == 1
    assert first.energy == pytest.approx(torch.cat(data).double().square().sum().item() * 2.0**-166, **EXACT)


@pytest.mark.parametrize("keep", [None, 4], ids=["exact", "sketched"])
def test_small_gradients_are_named_with_their_size(keep):
    model, slots = layers()
    data = [torch.randn(5, WIDTH) for _ in range(2)]

    def gradients(size):
        return said(
            lambda: mean_gradients(model, slots, data, lambda m, x: m(x).square().sum() * size, keep=[keep, None])
        )

    usual, told = gradients(2.0**-60)
    assert told == []
    small, (message,) = gradients(2.0**-130)
    sizes = [g.abs().amax().item() for g in small]
    assert f"{min(sizes):.1e}" in message
    assert f"[{slots[sizes.index(min(sizes))].name}]" in message
    assert "2 of 2" in message
    torch.testing.assert_close(small[1] * 2.0**70, usual[1], rtol=1e-3, atol=2.0**-70)


def told_by(name, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2))
    method = create(name, model, {"target_modules": ("0",), **({} if name == "gpm" else {"r": 2})})
    task = [size * torch.randn(8, WIDTH) for _ in range(2)]
    method.before_task(task, lambda m, x: m[0](x).sum())
    _, told = said(lambda: method.after_task(task, lambda m, x: m[0](x).sum()))
    return told


@pytest.mark.parametrize("name", ["keeplora", "gpm", "inflora", "loda"])
def test_every_method_closes_a_task_of_small_features_and_says_so(name):
    told = told_by(name, 1e-25)
    assert sum("after_task: features must" in message and "[0]" in message for message in told) == 1
    assert not any("features must" in message for message in told_by(name, 1.0))


def test_bases_of_gradients_do_not_depend_on_the_size_of_the_loss():
    """Squares of 1e-25: C is GᵀG."""

    def basis(size):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))
        settings = {"r": 2, "target_modules": "all-linear", "weight_energy": 0.0, "feature_energy": 0.8}
        keeper = KeepLora(model, KeepLoraConfig(**settings, feature_source="gradients"))
        task = [torch.randn(8, WIDTH) for _ in range(2)]

        def loss_fn(m, x):
            return m(x).square().sum() * size

        keeper.before_task(task, loss_fn)
        keeper.after_task(task, loss_fn)
        return keeper.basis("0")

    usual = basis(1.0)
    assert usual.shape[1] > 0
    assert torch.equal(basis(2.0**-83), usual)
    assert torch.equal(basis(2.0**70), usual)


@pytest.mark.parametrize("power", [-83, 83])
def test_bases_of_image_features_do_not_depend_on_their_size(power):
    images, tokens = torch.randn(20, WIDTH), torch.arange(2)[:, None]

    def task(size):
        calibration, seen = TaskCalibration(1.0), ImageFeatures()
        seen.observe(images * size, tokens)
        calibration.add(seen, 0.8)
        return calibration.known()[0]

    usual, other = task(1.0), task(2.0**power)
    assert usual.basis.shape[1] > 0
    torch.testing.assert_close((usual.basis.T @ other.basis).abs(), torch.eye(usual.basis.shape[1]), rtol=0, atol=1e-5)
    assert other.rest == pytest.approx(usual.rest, rel=1e-5, abs=0)
