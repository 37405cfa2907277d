"""Derivatives beyond one backward pass: refused where they would be wrong, right where a transform asks for them."""

import copy

import pytest
import torch
from close import assert_rounded
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from keeplora.lora import LoraAdapter, LoraAttention, LoraLinear

OUT, IN, RANK, TOKENS = 6, 5, 2, 40


def make(mode, dtype=torch.float32):
    layer = LoraLinear(nn.Linear(IN, OUT, dtype=dtype)).requires_grad_(False)
    layer.add_slot("weight", "weight", None)
    layer.slots["weight"].attach(
        LoraAdapter(torch.randn(RANK, IN, dtype=dtype), torch.randn(OUT, RANK, dtype=dtype), 0.5)
    )
    layer.forward_mode = mode
    return layer


@pytest.mark.parametrize("mode", ["merged", "auto"])
@pytest.mark.parametrize("through", ["y", "x"])
def test_the_merged_forward_refuses_second_derivatives(mode, through):
    """Also where dy needs no gradient: dx depends on B through the merged weight, which autograd does not know."""
    layer, x = make(mode), torch.randn(TOKENS, IN, requires_grad=True)
    y = layer(x)
    loss = y.square().sum() if through == "y" else y.sum()
    with pytest.raises(RuntimeError, match=r'forward_mode must be "factored" for second derivatives'):
        torch.autograd.grad(loss, x, create_graph=True)
    layer(x).sum().backward()  # the layer is as good as before
    assert layer.adapters["weight"].B.grad is not None


def test_the_factored_forward_has_second_derivatives():
    layer = make("factored", torch.float64)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, b: layer(x).tanh(), (x, layer.adapters["weight"].B))


@pytest.mark.parametrize("mode", ["merged", "factored", "auto"])
def test_function_transforms(mode):
    """torch.func's grad, vmap (gradients per sample) and jvp, on the layer with parameters of the caller's own."""
    layer, x = make(mode), torch.randn(TOKENS, IN)
    b = layer.adapters["weight"].B

    def loss(b, x):
        return functional_call(layer, {"slots.weight.adapter.B": b}, (x,)).square().sum()

    weight = layer.weight.double() + 0.5 * b.detach().double() @ layer.adapters["weight"].A.double()
    t = x.double() @ layer.adapters["weight"].A.double().T
    y = x.double() @ weight.T + layer.bias.double()
    per_sample = 0.5 * 2 * y[:, :, None] * t[:, None, :]
    assert_rounded(grad(loss)(b.detach(), x), per_sample.sum(0), terms=TOKENS**2, what="grad")
    assert_rounded(vmap(grad(loss), (None, 0))(b.detach(), x), per_sample, terms=TOKENS, what="per sample")
    tangent = torch.randn(TOKENS, IN)
    assert_rounded(jvp(layer, (x,), (tangent,))[1], tangent.double() @ weight.T, terms=TOKENS, what="jvp")


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 0, IN)], ids=str)
def test_inputs_of_one_dimension_and_of_no_tokens(shape):
    layer, x = make("merged"), torch.randn(shape, requires_grad=True)
    plain = copy.deepcopy(layer)
    plain.forward_mode = "factored"
    layer(x).sum().backward()
    dx, x.grad = x.grad, None
    plain(x).sum().backward()
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(layer.adapters["weight"].B.grad, plain.adapters["weight"].B.grad)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("slots", ["q", "qv", "qkv"])
def test_attention_keeps_tokens_times_rank_for_its_adapters(slots, batch_first):
    """Beside what the frozen attention keeps: one t for all of q, k, v, and the merged weight instead of W."""
    width, tokens = 16, 50
    base = nn.MultiheadAttention(width, 2, batch_first=batch_first).requires_grad_(False)
    x = torch.randn(tokens, 4, width, requires_grad=True)

    def kept(adapted):
        layer = LoraAttention(copy.deepcopy(base))
        for i, name in enumerate("qkv"):
            layer.add_slot(f"{name}_proj", "in_proj_weight", (width * i, width * i + width))
            if name in adapted:
                layer.slots[f"{name}_proj"].attach(LoraAdapter(torch.randn(RANK, width), torch.randn(width, RANK), 1.0))
        layer.forward_mode = "merged"
        storages = {}
        hold = torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t,
            lambda t: t,
        )
        with hold:
            layer(x, x, x, need_weights=False)
        return sum(storages.values())

    assert kept(slots) - kept("") == 4 * 4 * tokens * RANK * len(slots)
