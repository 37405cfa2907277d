import pytest
import torch
from close import assert_rounded
from precision import FASTER
from torch import nn

from keeplora.lora import LoraAdapter, linear_targets, wrap
from keeplora.statistics import feature_statistics

WIDTH = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.fc = nn.Linear(WIDTH, 5)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        y = self.drop(self.fc(self.attn(x, x, x, need_weights=False)[0]))
        return self.norm(y.transpose(1, 2))


def loss_fn(model, batch):
    return model(batch).square().mean()


@pytest.fixture
def wrapped():
    model = Block().train()
    return model, wrap(model, linear_targets(model))


def batches(n=3, tokens=6):
    return [torch.randn(2, tokens, WIDTH) for _ in range(n)]


def test_feature_statistics_match_float64_and_are_shared(wrapped):
    model, slots = wrapped
    data = batches()
    seen = []
    model.eval()
    handle = model.attn.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    for batch in data:
        model(batch)
    handle.remove()
    model.train()
    statistics = dict(zip([s.name for s in slots], feature_statistics(model, slots, data, loss_fn), strict=True))
    assert statistics["attn.q_proj"] is statistics["attn.k_proj"] is statistics["attn.v_proj"]
    x = torch.cat(data).double().flatten(0, 1)
    assert_rounded(statistics["attn.q_proj"].moment, x.T @ x, terms=36, what="qkv")
    heads = torch.cat(seen).flatten(0, 1)
    assert_rounded(statistics["attn.out_proj"].moment, heads.T @ heads, terms=1000**2, what="out")
    assert statistics["fc"].tokens == 36


def test_adapters_take_part_in_the_features(wrapped):
    model, slots = wrapped
    data = batches()
    before = feature_statistics(model, slots, data, loss_fn)[-1].moment
    slots[3].attach(LoraAdapter(torch.randn(2, WIDTH), torch.randn(WIDTH, 2), 1.0))
    assert not torch.allclose(before, feature_statistics(model, slots, data, loss_fn)[-1].moment)


def test_masked_tokens_do_not_count(wrapped):
    model, slots = wrapped
    data = batches()
    keep = torch.rand(2, 6) > 0.5
    [masked] = feature_statistics(model, slots[:1], data, loss_fn, token_mask=lambda slot, x: keep)
    x = torch.cat([batch[keep] for batch in data]).double()
    assert_rounded(masked.moment, x.T @ x, terms=36, what="masked")
    assert masked.tokens == 3 * int(keep.sum())


def test_slot_mean_is_the_public_codes_running_mean(wrapped):
    model, slots = wrapped
    data = [*batches(2), torch.randn(1, 6, WIDTH)]  # a smaller last batch counts at its own positions
    [got] = feature_statistics(model, slots[:1], data, loss_fn, kind="slot_mean")
    total, counts = torch.zeros(12, WIDTH, dtype=torch.float64), torch.zeros(12, 1, dtype=torch.float64)
    for batch in data:
        flat = batch.double().flatten(0, 1)
        total[: len(flat)] += flat
        counts[: len(flat)] += 1
    mean = total / counts
    assert_rounded(got.moment, mean.T @ mean, terms=144, what="slot mean")


def test_slot_mean_leaves_masked_tokens_at_their_positions(wrapped):
    model, slots = wrapped
    data, keeps = batches(3), [torch.rand(2, 6) > 0.4 for _ in range(3)]
    turns = iter(keeps)
    [got] = feature_statistics(
        model, slots[:1], data, loss_fn, kind="slot_mean", token_mask=lambda slot, x: next(turns)
    )
    weights = torch.stack(keeps).double()[..., None]
    mean = (torch.stack(data).double() * weights).sum(0) / weights.sum(0).clamp_min(1)
    mean = mean.flatten(0, 1)
    assert_rounded(got.moment, mean.T @ mean, terms=144, what="slot mean, masked")
    assert got.tokens == int(weights.sum())


def test_slot_mean_refuses_positions_that_mean_nothing(wrapped):
    """Texts of two lengths, and sequence-first layers whose last batch is short."""
    model, slots = wrapped
    with pytest.raises(ValueError, match=r"got \[7\] after \[6\] \[attn.q_proj\]"):
        feature_statistics(model, slots, [*batches(1), *batches(1, tokens=7)], loss_fn, kind="slot_mean")
    first = nn.Sequential(nn.Linear(WIDTH, 4))
    slots, data = wrap(first, linear_targets(first)), [torch.randn(5, 8, WIDTH), torch.randn(5, 3, WIDTH)]
    with pytest.raises(ValueError, match=r"got \[3\] after \[8\]"):
        feature_statistics(first, slots, data, loss_fn, kind="slot_mean")


def test_statistics_of_a_layer_called_with_shared_and_separate_inputs():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x)[0] + self.attn(x, 2 * x, 2 * x)[0]

    model = Cross()
    slots = wrap(model, linear_targets(model))
    x = torch.randn(1, 5, WIDTH)
    q, k, _, _ = feature_statistics(model, slots, [x], lambda model, batch: model(batch))
    second = x[0].double().T @ x[0].double()
    assert_rounded(q.moment, 2 * second, terms=25, what="q")
    assert_rounded(k.moment, 5 * second, terms=25, what="k")


class Separate(nn.Module):
    """q, k and v as three layers, as transformers has them; ``change`` may write into their input in between."""

    def __init__(self, change=lambda x: x):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.change = change

    def forward(self, x):
        q = self.q_proj(x)
        k, v = self.k_proj(self.change(x)), self.v_proj(x)
        return self.o_proj(q + k + v)


@pytest.mark.parametrize("inference", [False, True])
def test_separate_layers_share_the_statistic_of_their_common_input(inference):
    model = Separate()
    slots = wrap(model, linear_targets(model))
    data = batches()

    def forward(model, batch):
        with torch.inference_mode(inference):
            return model(batch)

    q, k, v, out = feature_statistics(model, slots, data, forward)
    assert q is k is v is not out
    x = torch.cat(data).double().flatten(0, 1)
    assert_rounded(q.moment, x.T @ x, terms=36, what="qkv")
    assert q.tokens == 36


@pytest.mark.parametrize("change", [lambda x: x.mul_(2), lambda x: 2 * x], ids=["in place", "copy"])
def test_layers_with_changed_inputs_do_not_share(change):
    model = Separate(change)
    slots = wrap(model, linear_targets(model))
    x = torch.randn(1, 5, WIDTH)
    exact = x[0].double().T @ x[0].double()
    q, k, v, _ = feature_statistics(model, slots, [x], lambda model, batch: model(batch))
    assert_rounded(q.moment, exact, terms=5, what="q")
    assert_rounded(k.moment, 4 * exact, terms=5, what="k")
    assert k is not q
    assert v is not q


def test_a_sketch_of_full_width_is_the_second_moment(wrapped):
    model, slots = wrapped
    data = batches()
    for dense, sketched in zip(
        feature_statistics(model, slots, data, loss_fn),
        feature_statistics(model, slots, data, loss_fn, kind="sketch", sketch_share=1.0),
        strict=True,
    ):
        factor = sketched.moment.factor
        # The core of the sketch may be as badly conditioned as the moment: its shift of 4 eps decides.
        assert (factor @ factor.T - dense.moment).norm() <= 1e-4 * dense.moment.norm()
        assert sketched.energy == pytest.approx(dense.moment.double().trace().item(), rel=1e-6)
        assert sketched.tokens == dense.tokens


def test_energies_add_up_in_float64():
    """Each token's is rounded to float32; ten thousand small ones beside a large one are not lost."""
    layer = nn.Sequential(nn.Linear(WIDTH, 1))
    slots = wrap(layer, linear_targets(layer))
    data = [torch.full((1, WIDTH), 1e4), *(torch.full((100, WIDTH), 1.0) for _ in range(100))]
    (statistic,) = feature_statistics(layer, slots, data, lambda model, batch: model(batch))
    exact = sum((x.double() ** 2).sum().item() for x in data)
    assert statistic.energy == pytest.approx(exact, rel=1e-7)


def _broken(value):
    data = batches()
    data[1][0, 0, 0] = value
    return data


@pytest.mark.parametrize(
    ("data", "kwargs", "message"),
    [
        ([], {}, "at least one batch, got none"),
        (_broken(float("inf")), {}, r"must be finite, got NaN or Inf in batch 1 \[attn.q_proj\]"),
        (batches(), {"kind": "sketch", "sketch_share": 0.0}, r"sketch_share must lie in \(0, 1\], got 0.0"),
        (batches(), {"kind": "mean"}, "kind must be 'second_moment', 'slot_mean' or 'sketch', got 'mean'"),
        (
            batches(),
            {"token_mask": lambda s, x: torch.zeros(2, 6, dtype=torch.bool)},
            r"got none in all 5 \[first: attn.q_proj\]",
        ),
    ],
    ids=["empty", "inf", "share", "kind", "masked"],
)
def test_feature_statistics_refuse(wrapped, data, kwargs, message):
    model, slots = wrapped
    with pytest.raises(ValueError, match=message):
        feature_statistics(model, slots, data, loss_fn, **kwargs)
    assert all(slot.host.observer is None for slot in slots)


def test_a_width_that_changes_names_its_layer():
    model = nn.Sequential(nn.Linear(WIDTH, 2))
    slots = wrap(model, linear_targets(model))
    data = [torch.randn(3, WIDTH), torch.randn(3, WIDTH + 1)]
    with pytest.raises(ValueError, match=rf"must have the layer's {WIDTH} columns, got {WIDTH + 1} \[0\]"):
        feature_statistics(model, slots, data, lambda model, batch: model(batch))


@pytest.mark.parametrize("faster", FASTER.values(), ids=FASTER.keys())
@pytest.mark.parametrize("kind", ["second_moment", "slot_mean", "sketch"])
def test_sums_are_exact_whatever_the_caller_switched_on(kind, faster):
    """A model's own products follow the caller; those of the statistics do not."""
    layer = nn.Linear(96, 8)
    slots = wrap(model := nn.Sequential(layer), linear_targets(model))
    data = [torch.randn(64, 96) for _ in range(3)]

    def moment():
        [statistic] = feature_statistics(model, slots, data, lambda m, x: m(x), kind=kind, sketch_share=0.5)
        return statistic.moment.factor if kind == "sketch" else statistic.moment

    expected = moment()
    with faster():
        assert torch.equal(moment(), expected)
