"""Mixtures of experts through whole tasks: every method, and what KeepLoRA promises of each expert."""

import copy
import dataclasses
import warnings

import pytest
import torch
from close import assert_rounded
from mixtures import (
    MIXTURES,
    built,
    experts_of,
    gpt_oss,
    llama4,
    loss_fn,
    mixtral,
    qwen3_moe,
    qwen3_vl_moe,
    text,
    train,
)

import keeplora
from keeplora.families import token_mask
from keeplora.lora import linear_targets, wrap
from keeplora.methods import METHODS, create
from keeplora.statistics import feature_statistics, mean_gradients
from tests.methods.contract import SMALL

REFUSE = {"dac", "duallora", "keeplora++cls"}
"""Methods of models with image features, or with class tokens: they say so."""
CONFIG = keeplora.KeepLoraConfig(r=2, target_modules="all-linear", weight_energy=0.3, feature_energy=0.4)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def settings_of(name):
    settings = copy.deepcopy(SMALL.get(name, {}))
    if name == "lines" or any(f.name == "target_modules" for f in dataclasses.fields(METHODS[name].config)):
        settings.get("settings", settings)["target_modules"] = "all-linear"
    return settings


@pytest.mark.parametrize("make", [qwen3_moe, mixtral])
@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.filterwarnings("ignore")  # of full layers and small updates: the tasks are tiny
def test_every_method_learns_with_experts_or_refuses_before_anything_changes(name, make):
    model, data, x = built(make), [text(0, padded=3), text(1)], text(9)
    before, kinds = logits(model, x), [type(module) for module in model.modules()]
    if name in REFUSE:
        with pytest.raises((ValueError, TypeError), match="Use "):
            create(name, model, settings_of(name))
        assert [type(module) for module in model.modules()] == kinds
        assert torch.equal(logits(model, x), before)
        return
    method = create(name, model, settings_of(name))
    method.before_task(data, loss_fn)
    assert torch.equal(logits(model, x), before)
    if method.trains:
        train(method, data)
    method.after_task(data)
    learned = logits(model, x)
    assert torch.equal(learned, before) is not method.trains
    method.before_task(data, loss_fn)
    if method.trains:
        train(method, data)
    twin = create(name, built(make), settings_of(name))
    twin.load_state(method.state())
    assert torch.equal(logits(twin.model, x), logits(model, x))
    method.abandon_task()
    assert torch.equal(logits(model, x), learned)
    method.merge()
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(logits(model, x), learned)


def swapped(model, *, weights):
    """The model with the first two experts of its first block changed places: in the router, or altogether."""
    block = model.model.layers[0].mlp
    order = [1, 0, *range(2, len(block.gate.weight))]
    with torch.no_grad():
        for weight in (block.gate.weight, *((block.experts.gate_up_proj, block.experts.down_proj) if weights else ())):
            weight.copy_(weight[order].clone())
    return model


@pytest.mark.parametrize("weights", [False, True])
def test_swapping_two_experts_tokens_swaps_their_bases(weights):
    """With the router alone, inputs of gate_up_proj; where the experts go along, whatever is known of them."""
    data = [text(seed, samples=6, padded=3) for seed in range(2)]
    settings = {"target_modules": "layers.0.mlp.experts", "weight_energy": 0.3 if weights else 0.0}
    bases, certificates = [], []
    for model in (built(mixtral, "eager"), swapped(built(mixtral, "eager"), weights=weights)):
        keeper = keeplora.KeepLora(model, dataclasses.replace(CONFIG, **settings))
        keeper.before_task(data, loss_fn)
        train(keeper, data)
        certificates.append({layer.name: layer for layer in keeper.after_task(data).layers})
        bases.append({t.name: keeper.basis(t.name).double() for t in keeper.targets})
    here, there = bases
    for name in here if weights else [name for name in here if "gate_up" in name]:
        other = name.replace(".experts.0.", ".experts.?.").replace(".experts.1.", ".experts.0.").replace("?", "1")
        q, p = here[name], there[other]
        assert q.shape == p.shape
        assert (q @ q.T - p @ p.T).abs().max() < 1e-5
        assert certificates[0][name].added == certificates[1][other].added
    first, second = (here[f"model.layers.0.mlp.experts.{e}.gate_up_proj"] for e in (0, 1))
    assert first.shape != second.shape or (first @ first.T - second @ second.T).abs().max() > 0.1


@pytest.mark.parametrize("make", [qwen3_moe, gpt_oss, llama4])
def test_no_experts_update_leaks_into_what_it_protects(make):
    """The weights themselves are looked at, in float64, over three tasks."""
    model = built(make, "eager", torch.float64) if make is not llama4 else built(make).double()
    keeper = keeplora.KeepLora(model, CONFIG)
    for seed in range(3):
        data = [text(seed, samples=6)]
        keeper.before_task(data, loss_fn)
        bases = [keeper.basis(slot.name).double() for slot in keeper.slots]
        weights = [slot.weight.detach().clone() for slot in keeper.slots]
        train(keeper, data)
        certificate = keeper.after_task(data)
        assert certificate.leak <= 1e-6
        moved = 0
        for slot, q, before, layer in zip(keeper.slots, bases, weights, certificate.layers, strict=True):
            change = slot.weight.detach() - before
            size = float(change.norm())
            moved += size > 0
            assert layer.name == slot.name
            assert float((change @ q).norm()) <= 1e-6 * size
        assert moved > len(keeper.slots) / 2
    rows = {layer.name: layer for layer in keeper.capacity()}
    expert = f"{experts_of(model)[0]}.0.down_proj"
    assert rows[expert].in_features == keeper.slots[[s.name for s in keeper.slots].index(expert)].weight.shape[1]


def test_experts_without_a_token_learn_nothing_and_are_counted_once():
    model, data = built(qwen3_moe), [text(0, samples=1, tokens=3)]
    keeper = keeplora.KeepLora(model, CONFIG)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        keeper.before_task(data, loss_fn)
    tokens = [statistic.tokens for statistic in feature_statistics(model, keeper.slots, data, loss_fn)]
    idle = [slot for slot, count in zip(keeper.slots, tokens, strict=True) if not count]
    assert all(slot.target.expert is not None and slot.adapter is None for slot in idle)
    mine = [str(w.message) for w in told if "routed" in str(w.message)]
    assert 0 < len(idle) < 32
    assert len(mine) == 1
    assert f"{len(idle)} of 32 adapted weights of experts" in mine[0]
    assert not any("no batch of the task reached" in str(w.message) for w in told)
    before = {slot.name: (slot.weight.detach().clone(), keeper.basis(slot.name)) for slot in idle}
    train(keeper, data, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        certificate = keeper.after_task([text(0, samples=1, tokens=3)])
    layers = {layer.name: layer for layer in certificate.layers}
    still = [slot for slot in idle if layers[slot.name].added == 0]
    assert still
    for slot in still:
        weight, basis = before[slot.name]
        assert torch.equal(slot.weight, weight)
        assert torch.equal(keeper.basis(slot.name), basis)


@pytest.mark.parametrize("make", MIXTURES)
def test_features_are_the_real_tokens_that_an_expert_is_given(make):
    model, data = built(make), [text(0, padded=4), text(1)]
    slots = wrap(model, keeplora.find_targets(model))
    with warnings.catch_warnings(), token_mask(model) as mask:
        warnings.simplefilter("error")
        found = feature_statistics(model, slots, data, loss_fn, token_mask=mask)
    tokens = dict.fromkeys(("gate_up_proj", "down_proj", "q_proj"), 0)
    for slot, statistic in zip(slots, found, strict=True):
        kind = slot.name.rpartition(".")[2]
        if ".layers.0." in slot.name and kind in tokens and "shared" not in slot.name:
            tokens[kind] += statistic.tokens
    chosen = {qwen3_moe: 3, llama4: 1}.get(make, 2)
    assert tokens["q_proj"] == sum(int(batch["attention_mask"].sum()) for batch in data)
    assert tokens["gate_up_proj"] == tokens["down_proj"] == chosen * tokens["q_proj"]


@pytest.mark.parametrize("make", [qwen3_moe, gpt_oss, llama4])
def test_moments_and_gradients_are_those_of_autograd_and_a_hook(make):
    """The moment of an expert from the rows its weight was multiplied with; its gradient from the whole weight's."""
    model = built(make, "eager", torch.float64) if make is not llama4 else built(make).double()
    plain, data = copy.deepcopy(model), [text(0), text(1)]
    slots = [s for s in wrap(model, keeplora.find_targets(model)) if s.target.expert is not None]
    found = mean_gradients(model, slots, data, loss_fn)
    weights = {slot.target: plain.get_submodule(slot.target.module).get_parameter(slot.parameter) for slot in slots}
    for batch in data:
        (loss_fn(plain, batch) / len(data)).backward()
    for slot, gradient in zip(slots, found, strict=True):
        whole = weights[slot.target].grad
        assert_rounded(gradient, slot.part(whole).double(), terms=512, what=slot.name, more=1e-12)
    moments = feature_statistics(model, slots, data, loss_fn)
    for slot, statistic in zip(slots, moments, strict=True):
        # G = δᵀx has its rows in the span of x
        values, vectors = torch.linalg.eigh(statistic.moment)
        null = vectors[:, values <= 1e-9 * max(float(values[-1]), 1e-300)]
        whole = slot.part(weights[slot.target].grad)
        assert (whole @ null).abs().max() <= 1e-4 * whole.abs().max().clamp_min(1e-300) if null.numel() else True
        assert statistic.energy == pytest.approx(float(statistic.moment.trace()))


@pytest.mark.parametrize(
    ("make", "dtype"), [(qwen3_moe, torch.float32), (mixtral, torch.bfloat16), (llama4, torch.bfloat16)]
)
def test_saved_loaded_merged_and_generated_from(make, dtype, tmp_path):
    model, data, prompt = built(make, dtype=dtype), [text(0, padded=2)], text(5, samples=2)["input_ids"]
    keeper = keeplora.KeepLora(model, CONFIG)
    keeper.before_task(data, loss_fn)
    train(keeper, data)
    keeper.save(tmp_path)
    other = keeplora.KeepLora.load(tmp_path, built(make, dtype=dtype))
    assert torch.equal(logits(other.model, data[0]), logits(model, data[0]))
    opened = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert other.after_task(data, loss_fn) == keeper.after_task(data)
    said = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert dtype != torch.float32 or torch.equal(said, opened)  # in 16 bits the merge rounds
    assert torch.equal(other.model.generate(prompt, max_new_tokens=6, do_sample=False), said)
    assert not torch.equal(logits(built(make, dtype=dtype), data[0]), logits(model, data[0]))
    keeper.merge()
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), said)


@pytest.mark.parametrize("make", MIXTURES)
def test_exported_to_stock_peft_they_are_the_same_model(make, tmp_path):
    import peft

    model, x = built(make), text(9)
    names = "experts" if make is qwen3_moe else "all-linear"
    keeper = keeplora.KeepLora(model, dataclasses.replace(CONFIG, target_modules=names))
    for seed in range(2):  # of unequal ranks: experts see few tokens
        data = [text(seed, samples=1, tokens=6)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            keeper.before_task(data, loss_fn)
        train(keeper, data)
        if not seed:
            keeper.after_task(data)
    before = logits(built(make), x)
    keeper.export_peft(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of patterns that match nothing
        stock = peft.PeftModel.from_pretrained(built(make), tmp_path).eval()
    size = before.abs().max().double()
    assert not torch.equal(logits(model, x), before)
    assert_rounded(logits(stock, x), logits(model, x).double(), terms=4096, size=size, what="logits")
    with pytest.raises(keeplora.StateError, match="target_parameters must be"):
        keeplora.KeepLora(built(make), CONFIG).import_peft(tmp_path)


def test_sketches_and_balance_work_for_experts_and_means_of_positions_do_not():
    config = dataclasses.replace(CONFIG, gradient_statistic="sketch", feature_statistic="sketch", balance=True)
    keeper, data = keeplora.KeepLora(built(qwen3_vl_moe), config), [text(0, samples=6)]
    keeper.before_task(data, loss_fn)
    train(keeper, data)
    assert keeper.after_task(data).leak <= 1e-6
    model = built(mixtral)
    with pytest.raises(ValueError, match=r'feature_statistic must be .* got "slot_mean"'):
        keeplora.KeepLora(model, dataclasses.replace(CONFIG, feature_statistic="slot_mean"))
    assert linear_targets(model)[0].name == "model.layers.0.self_attn.q_proj"
    assert type(experts_of(model)[1]).__name__ == "MixtralExperts"
