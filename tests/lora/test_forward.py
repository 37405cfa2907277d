"""Both ways to compute a layer with adapters: from the definition in float64, and as stubbornly as users call them."""

import copy

import pytest
import torch
from close import assert_rounded
from torch import nn
from torch.utils.checkpoint import checkpoint

from keeplora.lora import LoraAdapter, LoraAttention, LoraLinear, forward

MODES = ["merged", "formed again", "factored"]  # the second is the first with large weights
OUT, IN, TOKENS = 21, 13, 37
SPANS = [
    {"all": None},
    {"q": (0, 7)},
    {"v": (14, 21)},
    {"q": (0, 7), "v": (14, 21)},
    {"q": (0, 7), "k": (7, 14), "v": (14, 21)},
]


def make(spans, mode, dtype=torch.float32, *, origin=False, device="cpu"):
    layer = LoraLinear(nn.Linear(IN, OUT)).to(device, dtype).requires_grad_(False)
    for i, (slot, rows) in enumerate(spans.items()):
        layer.add_slot(slot, "weight", rows)
        out = OUT if rows is None else rows[1] - rows[0]
        b = torch.randn(out, 2 + i)
        adapter = LoraAdapter(torch.randn(2 + i, IN), b, 0.5 + i, origin=b.flip(0) if origin else None)
        layer.slots[slot].attach(adapter)
    layer.forward_mode = "factored" if mode == "factored" else "merged"
    return layer


@pytest.fixture(autouse=True)
def small_weights_are_formed_again(request, monkeypatch):
    mode = request.node.callspec.params.get("mode") if hasattr(request.node, "callspec") else None
    if mode == "formed again":
        monkeypatch.setattr(forward, "FORMED_AGAIN", 1)


def exact(layer, x, dy):
    """Output, gradient of x, gradient of every B; in float64, with the merged weight written down."""
    weight = layer.weight.detach().cpu().double().clone()
    for slot, adapter in layer.adapters.items():
        rows = layer.slots[slot].rows or (0, OUT)
        weight[rows[0] : rows[1]] += (
            adapter.scaling * adapter.update().detach().cpu().double() @ adapter.A.cpu().double()
        )
    x, dy = x.detach().cpu().double(), dy.cpu().double()
    grads = []
    for slot, adapter in layer.adapters.items():
        rows = layer.slots[slot].rows or (0, OUT)
        t = x @ adapter.A.cpu().double().T
        grads.append(adapter.scaling * dy[..., rows[0] : rows[1]].flatten(0, -2).T @ t.flatten(0, -2))
    return x @ weight.T + layer.bias.cpu().double(), dy @ weight, grads


@pytest.mark.parametrize("origin", [False, True], ids=["B", "B - B0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spans", SPANS, ids=lambda spans: "+".join(spans))
@pytest.mark.parametrize("mode", MODES)
def test_output_and_gradients_match_float64(mode, spans, dtype, origin, device):
    layer = make(spans, mode, dtype, origin=origin, device=device)
    x = torch.randn(3, TOKENS, IN, device=device).to(dtype).requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    out, dx, db = exact(layer, x, dy)
    assert y.dtype == x.grad.dtype == dtype
    half = dtype in (torch.bfloat16, torch.float16)
    # In 16 bits the merged weight, or t and the sum of the parts, are rounded to the format on the way.
    stages = (torch.finfo(dtype).eps / torch.finfo(torch.float32).eps) if half else 1
    assert_rounded(y, out, terms=(stages * 3) ** 2 + IN, what="y")
    assert_rounded(x.grad, dx, terms=(stages * 3) ** 2 + OUT, what="dx")
    for (slot, adapter), expected in zip(layer.adapters.items(), db, strict=True):
        assert adapter.B.grad.dtype == torch.float32
        rounding = torch.finfo(torch.float32).eps * 12 * (3 * TOKENS) ** 0.5 * (stages if half else 1)
        assert (adapter.B.grad.cpu() - expected).abs().max() <= rounding * expected.abs().max(), slot


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    layer = make({"q": (0, 7), "v": (14, 21)}, mode, torch.float64).double()
    for adapter in layer.adapters.values():
        adapter.A.data, adapter.B.data = adapter.A.data.double(), adapter.B.data.double()
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    bs = [adapter.B for adapter in layer.adapters.values()]
    assert torch.autograd.gradcheck(lambda x, *b: layer(x), (x, *bs))


def change_by_optimizer(layer):
    adapter = layer.adapters["all"]
    adapter.B.grad = torch.ones_like(adapter.B)
    torch.optim.SGD([adapter.B], lr=0.5).step()


def change_by_hand(layer):
    with torch.no_grad():
        layer.adapters["all"].B[0] += 1


def change_data(layer):
    layer.adapters["all"].B.data.mul_(-2)  # no version counter sees this


def replace_data(layer):
    layer.adapters["all"].B.data = torch.randn_like(layer.adapters["all"].B)


def load(layer):
    state = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)


def assign(layer):
    layer.adapters["all"].B = nn.Parameter(torch.randn_like(layer.adapters["all"].B))


def swap_average(layer):
    average = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    change_by_hand(layer)
    average.update_parameters(layer)
    for mine, other in zip(layer.parameters(), average.module.parameters(), strict=True):
        mine.data.copy_(other.data)


def rescale(layer):
    layer.adapters["all"].scaling *= 3


def change_weight(layer):
    layer.weight.data.add_(1)


CHANGES = [
    change_by_optimizer,
    change_by_hand,
    change_data,
    replace_data,
    load,
    assign,
    swap_average,
    rescale,
    change_weight,
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_merged_weight_is_never_stale(change, training):
    layer = make({"all": None}, "merged").train(training)
    x = torch.randn(5, IN)
    before = layer(x)
    if training:
        before.sum().backward()
    change(layer)
    after = layer(x)
    assert not torch.allclose(before, after)
    assert_rounded(after, exact(layer, x, after.detach())[0], terms=4 * IN, what="after")


@pytest.mark.parametrize("mode", MODES)
def test_functional_call_uses_its_own_parameters(mode):
    layer = make({"all": None}, mode)
    x = torch.randn(5, IN)
    plain = layer(x)
    other = make({"all": None}, mode)
    got = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert_rounded(got, exact(other, x, got.detach())[0], terms=4 * IN, what="functional")
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("mode", MODES)
def test_used_twice_in_a_step_and_under_checkpoints(mode):
    layer = make({"all": None}, mode)
    back = nn.Linear(OUT, IN)
    x = torch.randn(4, IN, requires_grad=True)

    def twice(x):
        return layer(torch.tanh(back(layer(x)))).square().sum()

    twice(x).backward()
    first = layer.adapters["all"].B.grad.clone()
    for reentrant in (True, False):
        layer.adapters["all"].B.grad = None
        checkpoint(twice, x, use_reentrant=reentrant).backward()
        assert torch.equal(layer.adapters["all"].B.grad, first)
    wide = copy.deepcopy(layer).double()
    wide.adapters["all"].A.data, wide.adapters["all"].B.data = (
        t.data.double() for t in (layer.adapters["all"].A, layer.adapters["all"].B)
    )
    wide.adapters["all"].B.grad = None
    layer, back = wide, copy.deepcopy(back).double()
    twice(x.detach().double().requires_grad_()).backward()
    assert_rounded(first, wide.adapters["all"].B.grad, terms=400, what="dB")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode, dtype):
    layer = make({"q": (0, 7), "v": (14, 21)}, mode)
    x = torch.randn(6, IN, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    dy = torch.randn_like(y)
    y.backward(dy)
    out, dx, db = exact(layer, x, dy)
    eps = torch.finfo(dtype).eps
    assert (y.double() - out).abs().max() <= 4 * eps * out.abs().max()
    assert x.grad.dtype == torch.float32
    assert (x.grad - dx).abs().max() <= 4 * eps * dx.abs().max()
    for adapter, expected in zip(layer.adapters.values(), db, strict=True):
        assert (adapter.B.grad - expected).abs().max() <= 4 * eps * expected.abs().max()


@pytest.mark.parametrize("mode", MODES)
def test_input_without_gradient_and_frozen_adapters(mode):
    layer = make({"q": (0, 7), "v": (14, 21)}, mode)
    layer.adapters["v"].requires_grad_(False)
    layer(torch.randn(4, IN)).sum().backward()
    assert layer.adapters["v"].B.grad is None
    assert layer.adapters["q"].B.grad is not None
    layer.requires_grad_(False)
    assert not layer(torch.randn(4, IN)).requires_grad
    x = torch.randn(4, IN, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_what_is_kept_for_the_backward_pass():
    """tokens x r numbers for the adapters, and no tokens x in: x belongs to whoever made it."""
    layer = make({"q": (0, 7), "k": (7, 14), "v": (14, 21)}, "merged")
    x = torch.randn(500, IN, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sorted(kept) == sorted([500 * (2 + 3 + 4), OUT * IN])


def test_no_large_merged_weight_is_kept(monkeypatch):
    """t and the layer's own tensors; what is formed again is formed of the same numbers, or autograd says so."""
    monkeypatch.setattr(forward, "FORMED_AGAIN", 1)
    layer = make({"q": (0, 7), "k": (7, 14), "v": (14, 21)}, "merged")
    x = torch.randn(500, IN, requires_grad=True)
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [t.numel() for t in kept if t.data_ptr() not in own] == [500 * (2 + 3 + 4)]
    assert not layer.to_merge  # nor formed ahead
    y = layer(x)
    with torch.no_grad():
        layer.adapters["q"].B.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("numbers", [2**22, 2**22 - 2**11])
def test_from_which_size_on_a_merged_weight_is_formed_again(numbers):
    layer = LoraLinear(nn.Linear(2**11, numbers // 2**11, bias=False, device="meta")).requires_grad_(False)
    layer.add_slot("all", "weight", None)
    layer.slots["all"].attach(
        LoraAdapter(torch.empty(1, 2**11, device="meta"), torch.empty(len(layer.weight), 1, device="meta"), 1.0)
    )
    layer(torch.empty(2**11, 2**11, device="meta"))
    assert bool(layer.to_merge) is (numbers < 2**22)


def test_trained_weights_biases_and_factors_take_the_factored_way():
    for name in ("weight", "bias", "slots.all.adapter.A"):
        layer = make({"all": None}, "merged")
        layer.get_parameter(name).requires_grad_(True)
        layer(torch.randn(50, IN)).square().sum().backward()
        assert layer.get_parameter(name).grad is not None
        assert layer.adapters["all"].B.grad is not None


def test_dropout_acts_in_training_only():
    layer = LoraLinear(nn.Linear(IN, OUT))
    layer.add_slot("all", "weight", None)
    layer.slots["all"].attach(LoraAdapter(torch.randn(3, IN), torch.randn(OUT, 3), 1.0, dropout=0.5))
    x = torch.randn(200, IN)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    mean = torch.stack([layer(x) - plain for _ in range(400)]).mean(0)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    delta = layer(x) - plain
    assert (mean - delta).norm() <= 0.1 * delta.norm()
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1.0"):
        LoraAdapter(torch.randn(3, IN), torch.randn(OUT, 3), 1.0, dropout=1.0)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_in_one_graph(mode):
    layer = make({"q": (0, 7), "v": (14, 21)}, mode)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, IN, requires_grad=True)
    grads = []
    for call in (layer, compiled):
        x.grad = None
        for adapter in layer.adapters.values():
            adapter.B.grad = None
        y = call(x)
        y.square().sum().backward()
        grads.append([y, x.grad.clone(), *(adapter.B.grad.clone() for adapter in layer.adapters.values())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_state_dicts(mode):
    layer = make({"all": None}, mode)
    x = torch.randn(50, IN)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), y)
    assert set(layer.state_dict()) == {"weight", "bias", "slots.all.adapter.A", "slots.all.adapter.B"}
    other = make({"all": None}, mode)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("subset", ["q", "k", "v", "qk", "qv", "qkv"])
def test_attention_is_the_same_both_ways(subset):
    """In float64: such factors make scores of a hundred, whose rounding (by CPUs, differently) a softmax multiplies."""
    base = nn.MultiheadAttention(16, 4, batch_first=True).double()
    x = torch.randn(3, 40, 16, dtype=torch.float64)
    outputs, factors = [], {name: (torch.randn(2, 16).double(), torch.randn(16, 2).double()) for name in "qkv"}
    for mode in ("merged", "factored"):
        layer = LoraAttention(copy.deepcopy(base)).requires_grad_(False)
        layer.forward_mode = layer.out_proj.forward_mode = mode
        for i, name in enumerate("qkv"):
            layer.add_slot(f"{name}_proj", "in_proj_weight", (16 * i, 16 * i + 16))
            if name in subset:
                layer.slots[f"{name}_proj"].attach(LoraAdapter(*factors[name], 0.7))
        y = layer(x, x, x, need_weights=False)[0]
        y.square().sum().backward()
        outputs.append([y, *(adapter.B.grad for adapter in layer.adapters.values())])
    for merged, factored in zip(*outputs, strict=True):
        assert merged.dtype == factored.dtype == torch.float64
        assert (merged - factored).abs().max() <= 1e-12 * factored.abs().max()
