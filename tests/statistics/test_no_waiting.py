"""Passes on a GPU ask nothing of it while a batch runs: a fake one, which refuses to tell a number, is observed."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

import keeplora.statistics.passes as passes
from keeplora.lora import linear_targets, wrap
from keeplora.statistics import feature_statistics
from keeplora.statistics.features import _Collector
from keeplora.statistics.input_sample import InputSample, evenly_spaced, evenly_spaced_on_device

WIDTH = 8


def made():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    return model, wrap(model, linear_targets(model))


@pytest.fixture
def masked_input(monkeypatch):
    """(slots, x, mask) on a device of which nothing can be asked."""
    _, slots = made()
    with FakeTensorMode():
        x = torch.empty(2, 5, WIDTH, device="cuda")
        mask = torch.empty(2, 5, dtype=torch.bool, device="cuda")
        yield slots, x, mask


def test_the_fake_device_refuses_to_tell(masked_input):
    _, x, mask = masked_input
    for ask in (lambda: x[mask].shape[0], lambda: mask.sum().item(), lambda: bool(mask.all())):
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            ask()


@pytest.mark.parametrize("kind", ["second_moment", "slot_mean", "sketch"])
def test_features_of_masked_tokens(masked_input, kind, monkeypatch):
    monkeypatch.setattr("keeplora.statistics.features.gaussian", lambda d, w, seed, like: like.new_empty(d, w))
    slots, x, mask = masked_input
    collector = _Collector(slots, kind, lambda slot, x: mask, 0.5, 0)
    for _ in range(2):
        collector.observe(slots[0].host, {slots[0].slot: x})
        collector.flush()
    assert len(collector.batch) == 2


def test_a_mask_on_the_host_is_for_the_device(masked_input):
    slots, x, _ = masked_input
    mask = torch.empty(2, 5, dtype=torch.bool, device="cpu")
    _Collector(slots, "second_moment", lambda slot, x: mask, 0.5, 0).observe(slots[0].host, {slots[0].slot: x})
    InputSample(slots, lambda slot, x: mask)(slots[0].host, {slots[0].slot: x})


def test_samples_of_masked_tokens(masked_input):
    slots, x, mask = masked_input
    sample = InputSample(slots, lambda slot, x: mask)
    sample(slots[0].host, {slots[0].slot: x})
    assert sample.kept[slots[0]][0].shape[1] == WIDTH


@pytest.mark.parametrize("kind", ["second_moment", "slot_mean", "sketch"])
def test_zeros_in_place_of_tokens_are_the_same_statistic(kind, monkeypatch):
    """As on a GPU, and what does not count may be NaN."""
    batches = [torch.randn(3, 7, WIDTH) for _ in range(3)]
    for x in batches:
        x[:, 5:] = torch.nan
        x[1] = torch.nan
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[:, :5], mask[1] = True, False

    def statistics():
        model, slots = made()
        torch.manual_seed(0)
        return feature_statistics(
            model, slots[:1], batches, lambda m, x: m(x), kind=kind, token_mask=lambda slot, x: mask, sketch_share=0.5
        )[0]  # fmt: skip

    alone = statistics()
    monkeypatch.setattr(
        "keeplora.statistics.features.rows_that_count",
        lambda x, mask, in_place: (passes.zeroed(x.reshape(-1, WIDTH), mask.reshape(-1)), mask.sum()),
    )
    zeros = statistics()
    assert alone.tokens == zeros.tokens == 30
    assert zeros.energy == pytest.approx(alone.energy, rel=1e-6)
    dense = [s.moment if isinstance(s.moment, torch.Tensor) else s.moment.factor for s in (alone, zeros)]
    torch.testing.assert_close(dense[1].abs(), dense[0].abs(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counting", [0, 1, 5, 63, 64, 65, 200, 301])
def test_the_same_rows_are_sampled_where_only_the_device_knows_their_number(counting):
    x, keep = torch.randn(301, WIDTH), torch.zeros(301, dtype=torch.bool)
    keep[torch.randperm(301)[:counting]] = True
    rows = evenly_spaced(x, keep, 64)
    padded = evenly_spaced_on_device(x, keep, 64)
    assert padded.shape == (64, WIDTH)
    assert torch.equal(padded[: len(rows)], rows)
    assert not padded[len(rows) :].any()
