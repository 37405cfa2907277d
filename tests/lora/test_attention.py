"""LoRA on nn.MultiheadAttention against a float64 computation from the definition, for every subset of targets."""

import itertools

import pytest
import torch
from close import assert_rounded
from torch import nn

from keeplora.lora import LoraAdapter, LoraAttention, Target, attention_targets, wrap

WIDTH, HEADS, RANK, SCALE = 24, 3, 5, 0.75
NAMES = ("q_proj", "k_proj", "v_proj", "out_proj")
SUBSETS = [c for n in range(5) for c in itertools.combinations(NAMES, n)]


class Holder(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **kwargs)
        nn.init.normal_(self.attn.out_proj.bias)
        if self.attn.in_proj_bias is not None:
            nn.init.normal_(self.attn.in_proj_bias)


def adapted(subset, **kwargs):
    holder = Holder(**kwargs).requires_grad_(False)
    all_targets = attention_targets("attn", holder.attn, 0, "model")
    slots = wrap(holder, [t for t in all_targets if t.name.split(".")[-1] in subset] or all_targets)
    for slot in slots:
        if slot.target.name.split(".")[-1] in subset:
            out, width = slot.weight.shape
            a, b = torch.randn(RANK, width) / width**0.5, torch.randn(out, RANK) / RANK**0.5
            slot.attach(LoraAdapter(a, b, SCALE))
    return holder, slots


def adapters_of(holder):
    [*own] = holder.attn.out_proj.adapters.values()
    return dict(holder.attn.adapters.items()) | dict(zip(["out_proj"], own, strict=False))


def exact(holder, query, key, value, mask=None, factors=None):
    """softmax(QKᵀ/√d + mask)V from weights gathered one by one, in float64. Shares no code with the layer.

    ``factors`` stand in for the adapters' B, so that autograd can differentiate with respect to them in float64.
    """
    attention = holder.attn
    if attention.in_proj_weight is not None:
        weights = dict(zip(NAMES, attention.in_proj_weight.detach().double().split(WIDTH), strict=False))
    else:
        weights = {n: getattr(attention, f"{n}_weight").detach().double() for n in NAMES[:3]}
    weights["out_proj"] = attention.out_proj.weight.detach().double()
    for name, adapter in adapters_of(holder).items():
        b = adapter.B.detach().double() if factors is None else factors[name]
        weights[name] = weights[name] + SCALE * b @ adapter.A.detach().double()
    bias = [b.double() for b in attention.in_proj_bias.detach().split(WIDTH)]
    q, k, v = (
        (x.double() @ weights[n].T + b).view(*x.shape[:2], HEADS, -1)
        for x, n, b in zip((query, key, value), NAMES, bias, strict=False)
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / (WIDTH / HEADS) ** 0.5
    scores = scores if mask is None else scores + mask
    probabilities = scores.exp() / scores.exp().sum(-1, keepdim=True)
    heads = torch.einsum("bhqk,bkhd->bqhd", probabilities, v).flatten(-2)
    return heads @ weights["out_proj"].T + attention.out_proj.bias.detach().double(), probabilities


# Longest chain of sums a number goes through: in-projection, adapter, scores, softmax, values, out-projection.
def terms(tokens):
    return (4 * WIDTH + 2 * RANK + 2 * tokens) ** 2  # errors add up along the chain, not as independent draws


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(s) or "none")
@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
def test_self_attention_matches_float64(subset, need_weights):
    holder, _ = adapted(subset, batch_first=True)
    x = torch.randn(2, 7, WIDTH)
    y, weights = holder.attn(x, x, x, need_weights=need_weights)
    exact_y, probabilities = exact(holder, x, x, x)
    assert_rounded(y.detach(), exact_y, terms=terms(7), what="y")
    if need_weights:
        assert_rounded(weights.detach(), probabilities.mean(1), terms=terms(7), what="weights")


def check_gradients(mode, holder, inputs, mask=None, **options):
    """Of every B and of every input, against autograd through the float64 definition."""
    holder.attn.forward_mode = holder.attn.out_proj.forward_mode = mode
    leaves = {id(x): x.clone().requires_grad_() for x in inputs}  # self-attention: one tensor three times
    y, _ = holder.attn(*(leaves[id(x)] for x in inputs), need_weights=False, **options)
    dy = torch.randn_like(y)
    y.backward(dy)
    doubles = {id(x): x.double().requires_grad_() for x in inputs}
    factors = {name: adapter.B.detach().double().requires_grad_() for name, adapter in adapters_of(holder).items()}
    exact(holder, *(doubles[id(x)] for x in inputs), mask, factors)[0].backward(dy.double())
    chain = 4 * terms(inputs[1].shape[1])  # forward and back: twice as long
    for name, adapter in adapters_of(holder).items():
        assert_rounded(adapter.B.grad, factors[name].grad, terms=chain, what=name)
    for x in inputs:
        assert_rounded(leaves[id(x)].grad, doubles[id(x)].grad, terms=chain, what="dx")


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(s) or "none")
@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_gradients_match_float64(subset, mode):
    holder, _ = adapted(subset, batch_first=True)
    x = torch.randn(2, 30, WIDTH)
    check_gradients(mode, holder, (x, x, x))


@pytest.mark.parametrize("subset", [("q_proj",), ("k_proj", "out_proj"), NAMES], ids="+".join)
@pytest.mark.parametrize("widths", [{}, {"kdim": 10, "vdim": 6}], ids=["fused", "other widths"])
@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_gradients_of_masked_cross_attention_match_float64(subset, widths, mode):
    holder, _ = adapted(subset, batch_first=True, **widths)
    query, key = torch.randn(2, 30, WIDTH), torch.randn(2, 30, widths.get("kdim", WIDTH))
    value = torch.randn(2, 30, widths.get("vdim", WIDTH))
    padding = torch.zeros(2, 30, dtype=torch.bool)
    padding[1, 20:] = True
    causal = torch.ones(30, 30, dtype=torch.bool).triu(1)
    mask = torch.zeros(2, 1, 30, 30, dtype=torch.float64)
    mask.masked_fill_(causal | padding[:, None, None], float("-inf"))
    check_gradients(mode, holder, (query, key, value), mask, key_padding_mask=padding, attn_mask=causal)


@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention_and_masks(batch_first):
    holder, _ = adapted(NAMES, batch_first=batch_first)
    query, key, value = torch.randn(2, 5, WIDTH), torch.randn(2, 8, WIDTH), torch.randn(2, 8, WIDTH)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 5:] = True
    causal = torch.zeros(5, 8).masked_fill(torch.ones(5, 8, dtype=torch.bool).triu(4), float("-inf"))
    mask = causal[None, None] + torch.zeros(2, 1, 1, 8).masked_fill(padding[:, None, None], float("-inf"))

    def turn(t):
        return t if batch_first else t.transpose(0, 1)

    y, _ = holder.attn(
        turn(query), turn(key), turn(value), key_padding_mask=padding, attn_mask=causal, need_weights=False
    )
    assert_rounded(turn(y).detach(), exact(holder, query, key, value, mask.double())[0], terms=terms(8), what="y")


def test_other_key_and_value_width():
    holder, _ = adapted(NAMES, batch_first=True, kdim=10, vdim=6)
    query, key, value = torch.randn(2, 5, WIDTH), torch.randn(2, 4, 10), torch.randn(2, 4, 6)
    y, _ = holder.attn(query, key, value, need_weights=False)
    assert_rounded(y.detach(), exact(holder, query, key, value)[0], terms=terms(4), what="y")


@pytest.mark.parametrize("kwargs", [{}, {"batch_first": True}, {"kdim": 10, "vdim": 6}, {"bias": False}], ids=str)
def test_without_adapters_it_is_the_layer_it_replaced(kwargs):
    base = nn.MultiheadAttention(WIDTH, HEADS, **kwargs)
    layer = LoraAttention(base)
    query = torch.randn(4, 6, WIDTH)
    key, value = torch.randn(4, 6, kwargs.get("kdim", WIDTH)), torch.randn(4, 6, kwargs.get("vdim", WIDTH))
    for need_weights in (True, False):
        expected = base(query, key, value, need_weights=need_weights)
        got = layer(query, key, value, need_weights=need_weights)
        torch.testing.assert_close(got[0], expected[0])
        if need_weights:
            torch.testing.assert_close(got[1], expected[1])
    assert dict(layer.state_dict()).keys() == dict(base.state_dict()).keys()


def test_unbatched_input_and_boolean_mask():
    base = nn.MultiheadAttention(WIDTH, HEADS)
    x, mask = torch.randn(6, WIDTH), torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected = base(x, x, x, attn_mask=mask)
    got = LoraAttention(base)(x, x, x, attn_mask=mask)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


def test_half_precision_on_the_cpu_takes_the_written_out_formula():
    holder, _ = adapted(NAMES, batch_first=True)
    x = torch.randn(2, 7, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = holder.attn(x, x, x, need_weights=False)
    assert y.dtype == torch.bfloat16
    exact_y, _ = exact(holder, x, x, x)
    # Every product rounds its inputs to bfloat16: eight of them lie between x and y.
    assert (y.double() - exact_y).abs().max() <= 8 * 2**-8 * exact_y.abs().max()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: LoraAttention(nn.Linear(2, 2)),
            TypeError,
            "base must be an nn.MultiheadAttention, got Linear",
        ),
        (
            lambda: LoraAttention(nn.MultiheadAttention(4, 2, add_bias_kv=True)),
            ValueError,
            "add_bias_kv=True",
        ),
        (
            lambda: LoraAttention(nn.MultiheadAttention(4, 2, add_zero_attn=True)),
            ValueError,
            "add_zero_attn=True",
        ),
        (
            lambda: LoraAttention(nn.MultiheadAttention(4, 2))(*[torch.zeros(1, 1, 4)] * 3, is_causal=True),
            ValueError,
            "attn_mask must be given",
        ),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_targets_name_row_ranges():
    base = nn.MultiheadAttention(6, 2)
    assert attention_targets("a", base, 3, "text")[1] == Target("a.k_proj", "a", "in_proj_weight", (6, 12), 3, "text")
