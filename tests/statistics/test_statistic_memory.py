"""What the statistics of a pass cost in memory is what their documentation says."""

import pytest
import torch
from torch import nn

from bench.harness import recorded_bytes
from keeplora.lora import linear_targets, wrap
from keeplora.statistics import feature_statistics, mean_gradients, sketch_widths
from keeplora.statistics.features import _Collector
from keeplora.statistics.passes import observing

BLOCKS, WIDTH, HIDDEN, RANK = 48, 128, 512, 12  # what one layer or batch needs meanwhile is small beside all sums
SHAPES = [(WIDTH, WIDTH)] * 4 + [(HIDDEN, WIDTH), (WIDTH, HIDDEN)]  # of a block's weights


class Block(nn.Module):
    """q, k and v read one tensor; every other layer one of its own."""

    def __init__(self, fused):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        if not fused:
            self.attn = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x):
        if isinstance(self.attn, nn.ModuleList):
            q, k, v, out = self.attn
            y = out(nn.functional.scaled_dot_product_attention(q(x), k(x), v(x)))
        else:
            y = self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(y)


def loss_fn(model, batch):
    return model(batch).square().mean()


@pytest.fixture(params=[True, False], ids=["fused", "separate"])
def passing(request):
    """The wrapped model, its slots, and batches of two tokens."""
    model = nn.Sequential(*(Block(request.param) for _ in range(BLOCKS)))
    return model, wrap(model, linear_targets(model)), [torch.randn(1, 2, WIDTH) for _ in range(2)]


@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_gradients(passing, kind):
    model, slots, data = passing
    widths = sketch_widths(slots, RANK, kind=kind)
    assert all((width is None) == (kind == "exact") for width in widths)
    mean_gradients(model, slots, data, loss_fn, keep=widths)  # what is allocated once and kept
    peak, held = recorded_bytes(lambda: mean_gradients(model, slots, data, loss_fn, keep=widths))
    documented = BLOCKS * sum(4 * (out if kind == "exact" else 8 * RANK) * width for out, width in SHAPES)
    assert held == pytest.approx(documented, rel=0.1)
    assert peak == pytest.approx(documented, rel=0.1)


def test_second_moments(passing):
    model, slots, data = passing
    feature_statistics(model, slots, data, loss_fn)
    peak, held = recorded_bytes(lambda: feature_statistics(model, slots, data, loss_fn))
    documented = BLOCKS * 4 * (3 * WIDTH**2 + HIDDEN**2)  # of the inputs of: q, k and v; out; the two layers of the mlp
    assert held == pytest.approx(documented, rel=0.1)
    assert peak == pytest.approx(documented, rel=0.1)


@pytest.mark.parametrize("kind", ["sketch", "slot_mean"])
def test_other_feature_statistics(kind):
    """A sketch holds w columns of the moment, slot_mean the longest batch, until the pass is over."""
    share, tokens, layers = 0.25, 256, 16
    model = nn.Sequential(*(nn.Linear(HIDDEN, HIDDEN) for _ in range(layers)))
    slots, data = wrap(model, linear_targets(model)), [torch.randn(tokens, HIDDEN) for _ in range(2)]

    def gather():
        collector = _Collector(slots, kind, None, share, 0)
        with torch.no_grad(), observing(list(collector.by_host), collector.observe):
            for index, batch in enumerate(data):
                model(batch)
                collector.end_batch(index)
        return collector

    gather()
    _, kept = recorded_bytes(gather)
    documented = layers * 4 * HIDDEN * (tokens if kind == "slot_mean" else round(share * HIDDEN))
    assert kept == pytest.approx(documented, rel=0.1)
