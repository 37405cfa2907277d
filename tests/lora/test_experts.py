"""Experts in weights of three dimensions: every layout and product against a loop over tokens in float64."""

import copy
import importlib

import pytest
import torch
from close import assert_rounded
from mixtures import MIXTURES, built, experts_of, gpt_oss, llama4, loss_fn, mixtral, qwen3_moe, text
from torch import nn

import keeplora
from keeplora.lora import (
    LoraAdapter,
    LoraExperts,
    Target,
    expert_layout,
    grouped,
    linear_targets,
    select_targets,
    unwrap,
    wrap,
)
from keeplora.lora.grouped import Groups

TOKENS = 11
FORMS = [
    (qwen3_moe, "eager"), (qwen3_moe, "grouped_mm"), (qwen3_moe, "batched_mm"), (mixtral, "grouped_mm"),
    (gpt_oss, "eager"), (gpt_oss, "grouped_mm"), (llama4, None),
]  # fmt: skip


def held(make, implementation, dtype, *, train_a=False, origin=False):
    """A module of experts whose weights carry adapters of ranks 1 and 2, but for one expert."""
    generator = torch.Generator().manual_seed(1)
    parent = nn.ModuleDict({"experts": experts_of(built(make, implementation, dtype))[1]})
    slots = wrap(parent.requires_grad_(False), linear_targets(parent))
    for slot in slots:
        (out, width), rank = slot.weight.shape, 1 + slot.target.expert % 2
        draws = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3
                 for shape in ((rank, width), (out, rank), (out, rank))]  # fmt: skip
        if slot.target.expert != 1:
            a, b, b0 = draws
            slot.attach(LoraAdapter(a, b, 0.5 + rank, train_a=train_a, origin=b0 if origin else None))
    return parent["experts"], slots


def routed(layer, dtype):
    """Inputs of the module, and two experts for each token; expert 2 is idle, and expert 1 has no adapter."""
    generator = torch.Generator().manual_seed(2)
    width = next(iter(layer.slots.values())).weight.shape[1]
    x = torch.randn(TOKENS, width, generator=generator, dtype=torch.float64)
    busy = torch.tensor([expert for expert in range(layer.experts) if expert != 2])
    index = torch.stack([busy[torch.randperm(len(busy), generator=generator)[:2]] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, 2, generator=generator, dtype=torch.float64) + 0.1
    return x.to(dtype), index, weights.to(dtype)


def called(layer, x, index, weights):
    """The module's output ``[tokens, width]``, as its block calls it."""
    if layer.layout.routed:
        return layer(x, index, weights)
    scores = torch.zeros(TOKENS, layer.experts, dtype=x.dtype).scatter(1, index, weights)
    given = x.repeat(layer.experts, 1) * scores.T.reshape(-1, 1)
    return layer(given).view(layer.experts, TOKENS, -1).sum(0)


def reference(layer, x, index, weights, factors):
    """The same from nothing but the formula, token by token, in float64; ``factors``: A and B by slot."""
    effective = {}
    for name, slot in layer.slots.items():
        weight = slot.weight.detach().double()
        if name in factors:
            a, b, origin = factors[name]
            weight = weight + slot.adapter.scaling * (b if origin is None else b - origin) @ a
        effective[slot.parameter, slot.target.expert] = weight
    first, last = layer.layout.parameters
    rows = []
    for token in range(TOKENS):
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        for j, expert in enumerate(index[token].tolist()):
            share = weights[token, j].double()
            inner = x[token] * (1.0 if layer.layout.routed else share)
            h = effective[first, expert] @ inner
            if hasattr(layer, "gate_up_proj_bias"):
                h = h + layer.gate_up_proj_bias[expert].double()
                gate, up = h[::2].clamp(max=layer.limit), h[1::2].clamp(-layer.limit, layer.limit)
                h = (up + 1) * gate * torch.sigmoid(layer.alpha * gate)
            else:
                gate, up = h.chunk(2)
                h = gate * torch.sigmoid(gate) * up
            y = effective[last, expert] @ h
            if hasattr(layer, "down_proj_bias"):
                y = y + layer.down_proj_bias[expert].double()
            total = total + (share if layer.layout.routed else 1.0) * y
        rows.append(total)
    return torch.stack(rows)


WIDE = [
    (qwen3_moe, "eager"),
    (mixtral, "eager"),
    (gpt_oss, "eager"),
    (llama4, None),
]  # grouped products have no float64


@pytest.mark.parametrize("mode", ["merged", "factored", "A trained"])
@pytest.mark.parametrize(
    ("make", "implementation", "dtype"),
    [(*form, torch.float32) for form in FORMS] + [(*form, torch.float64) for form in WIDE],
)
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(make, implementation, dtype, mode):
    train_a = mode == "A trained"
    layer, _ = held(make, implementation, dtype, origin=make is mixtral, train_a=train_a)
    layer.forward_mode = "auto" if train_a else mode
    x, index, weights = routed(layer, dtype)
    inputs = x.requires_grad_(True), weights.requires_grad_(True)
    y = called(layer, x, index, weights)
    grown = {}
    for name, adapter in layer.adapters.items():
        a, b = (p.detach().double().requires_grad_(True) for p in (adapter.A, adapter.B))
        grown[name] = a, b, None if adapter.origin is None else adapter.origin.double()
    wide = [tensor.detach().double().requires_grad_(True) for tensor in inputs]
    exact = reference(layer, wide[0], index, wide[1], grown)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y.backward(up.to(dtype))
    exact.backward(up.to(dtype).double())
    terms = 64 * (x.shape[1] + layer.get_parameter("down_proj").shape[-1])  # two products, one behind the other
    assert_rounded(y, exact.detach(), terms=terms, what="y")
    for tensor, true, what in zip(inputs, wide, ("x", "weights"), strict=True):
        assert_rounded(tensor.grad, true.grad, terms=terms, what=what)
    for name, factors in grown.items():
        for letter, true in zip("AB" if train_a else "B", factors if train_a else factors[1:], strict=False):
            grad = getattr(layer.adapters[name], letter).grad
            if true.grad is None or not true.grad.any():
                assert grad is None or not grad.any(), name  # an expert without a token
            else:
                assert_rounded(grad, true.grad, terms=terms * TOKENS, what=f"{name}.{letter}")


KINDS = {
    "nemotron_h.NemotronHExperts": "NemotronHConfig",  # without a gate
    "muse_spark.MuseSparkExperts": "MuseSparkTextConfig",  # a norm behind each expert
    "aria.AriaExperts": "AriaTextConfig",  # transposed
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": "OpenAIPrivacyFilterConfig",  # with biases, too
    "deepseek_v4.DeepseekV4Experts": "DeepseekV4Config",  # a gate of its own
}
"""Modules of experts that differ in more than their names; there are 68 in transformers 5.24."""


class Sizes:
    """A model's own configuration, but for its sizes."""

    def __init__(self, config, implementation):
        self.config, self._experts_implementation = config, implementation

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("hidden_size", "moe_latent_size"):
            return 16
        experts = {"num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"}
        return 4 if name in experts else 8 if "intermediate" in name else getattr(self.config, name)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_experts_computes_as_if_its_adapters_were_merged(kind, implementation):
    name, cls = kind.split(".")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    torch.manual_seed(0)
    base = getattr(module, cls)(Sizes(getattr(module, KINDS[kind])(), implementation)).requires_grad_(False)
    for parameter in base.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    merged, parent = copy.deepcopy(base), nn.ModuleDict({"experts": base})
    slots = wrap(parent, linear_targets(parent))
    for slot in slots:
        out, width = slot.weight.shape
        slot.attach(LoraAdapter(torch.randn(2, width), 0.1 * torch.randn(out, 2), 0.5))
        adapter = slot.adapter
        slot.part(merged.get_parameter(slot.parameter)).add_(0.5 * adapter.B.detach() @ adapter.A)
    x, weights = torch.randn(9, slots[0].weight.shape[1]), torch.rand(9, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    exact = merged(x, index, weights)
    for mode in ("factored", "merged"):
        parent["experts"].forward_mode = mode
        assert_rounded(parent["experts"](x, index, weights), exact.double(), terms=4096, what=f"{kind} {mode}")


def test_gradients_of_a_trained_a_and_second_derivatives():
    layer, _ = held(qwen3_moe, "eager", torch.float64, train_a=True)
    x, index, weights = routed(layer, torch.float64)
    adapter = layer.adapters["gate_up_proj_0"]
    assert torch.autograd.gradcheck(lambda *_: layer(x, index, weights), (adapter.A, adapter.B))
    layer, _ = held(qwen3_moe, "eager", torch.float64)
    layer.forward_mode = "merged"
    y = layer(x.requires_grad_(True), index, weights)
    with pytest.raises(RuntimeError, match=r'forward_mode must be "factored" for second derivatives'):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_experts_are_merged_where_that_is_asked_for_in_one_call_for_all(monkeypatch):
    layer, _ = held(mixtral, "grouped_mm", torch.float32)
    merged, merge = [], grouped._merge

    def counted(*args):
        merged.append(1)
        return merge(*args)

    monkeypatch.setattr(grouped, "_merge", counted)
    x, index = torch.randn(400, 16), torch.randint(4, (400, 1))
    for mode, calls in (("auto", 0), ("factored", 0), ("merged", 2)):  # one for each of the module's two weights
        layer.forward_mode = mode
        layer(x, index, torch.ones(400, 1))
        assert len(merged) == calls


@pytest.mark.parametrize(("make", "implementation"), FORMS)
def test_without_adapters_and_around_empty_ones_nothing_is_computed_otherwise(make, implementation):
    model, batch = built(make, implementation), text(0, padded=3)
    path, base = experts_of(model)
    keys, before = list(model.state_dict()), model(**batch).logits
    slots = wrap(model, keeplora.find_targets(model))
    assert torch.equal(model(**batch).logits, before)
    assert list(model.state_dict()) == keys
    for slot in slots:
        out, width = slot.weight.shape
        slot.attach(LoraAdapter(torch.randn(2, width), torch.zeros(out, 2), 1.0))
    again = model(**batch).logits
    if implementation != "batched_mm" and make not in (llama4, gpt_oss):  # there in another order: the same to rounding
        assert torch.equal(again, before)
    assert_rounded(again, before.double().detach(), terms=4096, what="logits")
    for slot in slots:
        slot.detach()
    assert unwrap(model).get_submodule(path) is base
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("make", MIXTURES)
def test_experts_are_targets_like_any_other(make):
    model = built(make)
    targets, path = keeplora.find_targets(model), experts_of(model)[0]
    layout = expert_layout(model.get_submodule(path))
    experts = [t for t in targets if t.expert is not None]
    assert layout.transposed is (make in (llama4, gpt_oss))
    assert [t.name for t in experts[:2]] == [f"{path}.{e}.gate_up_proj" for e in (0, 1)]
    assert {t.depth for t in experts} == {0, 1}
    assert select_targets(targets, "experts") == experts
    named = select_targets(targets, [f"{path}.1", "down_proj"])
    assert {t.expert for t in named if t.parameter == "gate_up_proj"} == {1}
    share = keeplora.KeepLora(model, keeplora.KeepLoraConfig(r=2, target_modules="all-linear")).targets.share
    matrices = {n: p.numel() for n, p in built(make).named_parameters()
                if ".layers." in n and p.dim() > 1 and not n.endswith("_bias")}  # fmt: skip
    routers = sum(size for name, size in matrices.items() if name.endswith(("mlp.gate.weight", "router.weight")))
    assert share == pytest.approx(1 - routers / sum(matrices.values()))


def test_a_stand_in_is_its_module_elsewhere_too():
    """Copies are independent, moves and casts reach the weights, and hooks of the model see one module."""
    model, batch = built(qwen3_moe), text(0)
    wrap(model, keeplora.find_targets(model))
    path, layer = experts_of(model)
    assert isinstance(layer, LoraExperts)
    assert layer.num_experts == layer.experts == 8
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_submodule(path).gate_up_proj.zero_()
    assert not torch.equal(model(**batch).logits, twin(**batch).logits)
    assert twin.get_submodule(path).plain().gate_up_proj is twin.get_submodule(path).gate_up_proj
    model.to(torch.bfloat16)
    assert layer.plain().gate_up_proj.dtype == layer.slots["gate_up_proj_3"].weight.dtype == torch.bfloat16
    assert [name for name, _ in model.named_modules() if name.endswith("act_fn")]


def test_checkpointed_activations_give_the_same_gradients():
    grads = []
    for checkpointed in (False, True):
        model, batch = built(qwen3_moe), text(0)
        keeper = keeplora.KeepLora(model, keeplora.KeepLoraConfig(r=2, target_modules="experts", weight_energy=0.3))
        keeper.before_task([batch], loss_fn)
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.train()
        loss_fn(model, batch).backward()
        grads.append([p.grad for p in keeper.trainable_parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_in_the_models_own_products(dtype, implementation):
    """One has the products of its loop in half precision, the other none."""
    model, batch = built(mixtral, implementation), text(0)
    keeper = keeplora.KeepLora(model, keeplora.KeepLoraConfig(r=2, target_modules="experts", weight_energy=0.3))
    with torch.autocast("cpu", dtype):
        before = model(**batch).logits
        keeper.before_task([batch], loss_fn)
        assert torch.equal(model(**batch).logits, before)
    loss_fn(model, batch).backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in keeper.trainable_parameters())


def test_what_is_not_known_to_compute_experts_is_refused():
    model = built(mixtral, "eager")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("mine", lambda *_: None)
    model.set_experts_implementation("mine")
    targets = keeplora.find_targets(model)
    with pytest.raises(ValueError, match=r"experts_implementation must be one of .*got 'mine'.*\"eager\""):
        wrap(model, targets)
    assert not any(isinstance(module, LoraExperts) for module in model.modules())
    model.set_experts_implementation("eager")
    experts_of(model)[1]._is_expert_parallel = True
    with pytest.raises(ValueError, match="shared out"):
        wrap(model, targets)
    experts_of(model)[1]._is_expert_parallel = False
    slots = wrap(model, targets)
    host = next(slot.host for slot in slots if slot.target.expert is not None)
    with pytest.raises(ValueError, match="expert must lie in"):
        host.add_slot("more", "down_proj", None, Target("x", "", "down_proj", None, 0, "model", 4))
    with pytest.raises(ValueError, match="a second time"):
        host.add_slot("more", "down_proj", None, Target("x", "", "down_proj", None, 0, "model", 3))


def test_groups_of_sorted_rows():
    groups = Groups.of(torch.tensor([0, 0, 2, 2, 2]), 4, loops=False)
    assert groups.spans == [(0, 2), (2, 2), (2, 5), (5, 5)]
    assert groups.ids(5).tolist() == [0, 0, 2, 2, 2]
    assert [part.tolist() for part in groups.split(torch.arange(5))] == [[0, 1], [], [2, 3, 4], []]
