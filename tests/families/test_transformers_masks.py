"""transformers' families: which tokens count as features."""

import copy
import re

import pytest
import torch
from families.members import CONFIG, MEMBERS, PAD, fresh, loss_fn, start

import keeplora
from keeplora.families import find_targets, token_mask
from keeplora.lora import wrap
from keeplora.statistics import feature_statistics


def bases(name, task, **changes):
    model, _ = fresh(name)
    keeper = keeplora.KeepLora(model, CONFIG)
    keeper.before_task([{**batch, **changes} for batch in task], loss_fn)
    keeper.after_task([{**batch, **changes} for batch in task])
    return [keeper.basis(slot.name) for slot in keeper.slots]


def with_other_padding(batch):
    pad = batch["input_ids"] == PAD
    return {**batch, "input_ids": torch.where(pad, torch.randint_like(batch["input_ids"], 3, 48), batch["input_ids"])}


@pytest.mark.parametrize("name", ["clip", "siglip2", "llava", "llama"])
def test_padding_does_not_count(name):
    """Right padding behind the text of CLIP and LLaVA, left padding of Llama, masked patches of SigLIP2's images."""
    model, (task, _) = start(name)
    other = [with_other_padding(batch) for batch in task]
    if name == "siglip2":
        other = [
            {**b, "pixel_values": torch.where(b["pixel_attention_mask"][..., None] == 0, 7.0, b["pixel_values"])}
            for b in other
        ]
    assert all(torch.equal(a, b) for a, b in zip(bases(name, task), bases(name, other), strict=True))
    slots = wrap(copy.deepcopy(model), find_targets(model))
    counts = {tower: tokens(name, slots, task, tower) for tower in MEMBERS[name].kinds}
    real = sum(int(batch["attention_mask"].sum()) for batch in task)
    assert counts[next(t for t in counts if t != "vision")] == real
    if name == "siglip2":
        assert counts["vision"] == sum(int(batch["pixel_attention_mask"].sum()) for batch in task)


def tokens(name, slots, task, tower):
    model, _ = fresh(name)
    mine = [slot for slot in wrap(model, find_targets(model)) if slot.target.tower == tower]
    with token_mask(model) as mask:
        statistics = feature_statistics(model, mine, task, loss_fn, token_mask=mask)
    assert len({s.tokens for s in statistics}) == 1
    return statistics[0].tokens


def test_clip_counts_up_to_the_end_of_text_without_a_mask():
    _, (task, _) = start("clip")
    bare = [{k: v for k, v in batch.items() if k != "attention_mask"} for batch in task]
    real = sum(int(batch["attention_mask"].sum()) for batch in task)
    assert tokens("clip", None, bare, "text") == real


def test_siglip_counts_all_that_it_attends_to():
    _, (task, _) = start("siglip")
    assert tokens("siglip", None, task, "text") == sum(batch["input_ids"].numel() for batch in task)


def test_masks_in_every_form(monkeypatch):
    """Two dimensions, longer than the input where a cache is filled, prepared with four, positional, none."""
    model, (task, _) = fresh("llama")
    slot = wrap(model, find_targets(model))[0]
    ids, mask2 = task[0]["input_ids"], task[0]["attention_mask"]
    length = ids.shape[1]
    seen = {}
    slot.host.observer = lambda host, inputs: seen.update(x=inputs["weight"])
    causal = torch.ones(length, length).tril().bool() & mask2.bool()[:, None, None, :]
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    expected = mask2.bool()
    with token_mask(model) as mask, torch.no_grad():
        for given in (mask2, mask2.bool(), causal, additive):
            model(input_ids=ids, attention_mask=given)
            assert torch.equal(mask(slot, seen["x"]), expected)
        model.model(ids, mask2)
        assert torch.equal(mask(slot, seen["x"]), expected)
        model(input_ids=ids)
        assert mask(slot, seen["x"]) is None
        cache = model(input_ids=ids[:, :-2], attention_mask=mask2[:, :-2], use_cache=True)
        past = cache.cache if "cache" in cache else cache.past_key_values
        model(ids[:, -2:], mask2, **{"cache" if "cache" in cache else "past_key_values": past})
        assert mask(slot, seen["x"]) is None  # padded on the left: the last two of each count
        model(input_ids=ids, attention_mask=mask2)
        flat = seen["x"].flatten(0, 1)
        assert torch.equal(mask(slot, flat), expected.flatten())
        assert mask(slot, flat[expected.flatten()]) is None  # only the real tokens are there
    told = f"{re.escape(str(list(mask2.shape)))} for an input of {re.escape('[5, 16]')} .*q_proj.*token_mask="
    context = token_mask(model)
    mask = context.__enter__()
    model(input_ids=ids, attention_mask=mask2)
    assert mask(slot, flat[:5]) is None
    with pytest.warns(UserWarning, match=told):
        context.__exit__(None, None, None)


def test_queries_keys_and_values_share_one_statistic():
    model, (task, _) = fresh("llava")
    slots = wrap(model, find_targets(model))
    with token_mask(model) as mask:
        found = dict(
            zip([s.name for s in slots], feature_statistics(model, slots, task, loss_fn, token_mask=mask), strict=True)
        )
    block = "model.language_model.layers.0"
    q, k, v = (found[f"{block}.self_attn.{letter}_proj"] for letter in "qkv")
    assert q is k is v
    assert found[f"{block}.mlp.gate_proj"] is found[f"{block}.mlp.up_proj"]
    assert q is not found[f"{block}.self_attn.o_proj"]
