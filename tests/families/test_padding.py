"""Padding never counts: in every family, whatever form a mask has and in whichever order a layer's axes stand."""

import pytest
import torch
import transformers as tf
from families.members import CONFIG, MEMBERS, PAD, batches, fresh
from families.texts import TEXTS, families_loss, first_tokens, more_of, own_targets, text_model, texts
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

import keeplora
from keeplora.families import find_targets, token_mask
from keeplora.families._padding import match
from keeplora.lora import wrap
from keeplora.statistics import feature_statistics

SAMPLES, TOKENS = 3, 5
KEEP = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
LEFT = KEEP.flip(1)
LOWEST = torch.finfo(torch.float32).min
CAUSAL = torch.ones(TOKENS, TOKENS).tril().bool()
TWO = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]], dtype=torch.bool)
EYE = torch.eye(TOKENS, dtype=torch.bool)
SQUARE = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool().flip(1)


def pairs(keep):
    """``[batch, 1, queries, keys]`` of a causal model."""
    return CAUSAL & keep[:, None, None, :]


def added(visible, low=LOWEST):
    return torch.zeros(visible.shape).masked_fill(~visible, low)


def with_empty_slots(visible, past=4, empty=6):
    """The mask of a cache of a fixed size: filled, new, and not filled yet."""
    filled = torch.ones(*visible.shape[:-1], past, dtype=torch.bool)
    return torch.cat([filled, visible, torch.zeros(*visible.shape[:-1], empty, dtype=torch.bool)], -1)


def block_mask():
    return create_block_mask(
        lambda b, h, q, k: (q >= k) & KEEP[b, k], SAMPLES, None, TOKENS, TOKENS, device="cpu", BLOCK_SIZE=4
    )


@pytest.mark.parametrize(
    ("mask", "keep"),
    [
        (KEEP, KEEP),
        (KEEP.long() * torch.tensor([[1], [2], [7]]), KEEP),  # numbers of packed texts
        (added(KEEP, -1e4), KEEP),
        (pairs(KEEP), KEEP),
        (pairs(LEFT), LEFT),
        (pairs(LEFT).expand(SAMPLES, 2, TOKENS, TOKENS), LEFT),  # one per head
        (pairs(LEFT)[:, 0], LEFT),
        (~pairs(KEEP), KEEP),  # True means hidden
        (added(pairs(LEFT)), LEFT),
        (added(pairs(LEFT), -1e4), LEFT),  # as old models do
        (added(pairs(LEFT), -torch.inf), LEFT),
        (pairs(TWO) | EYE, TWO),  # rows that see only themselves
        (pairs(LEFT) | ~pairs(LEFT).any(-1, keepdim=True), LEFT),  # rows that see everything
        (KEEP[:, None, None, :].expand(SAMPLES, 1, TOKENS, TOKENS), KEEP),  # an encoder's
        (KEEP[:, None, None, :], KEEP),
        (block_mask(), KEEP),
        ({"sliding_attention": torch.ones(SAMPLES, 1, TOKENS, 2), "full_attention": pairs(LEFT)}, LEFT),
    ],
    ids=range(17),
)
def test_masks_of_every_form(mask, keep):
    x = torch.randn(SAMPLES, TOKENS, 2)
    assert torch.equal(match([mask], x, None).keep, keep)
    assert torch.equal(match([mask], x.transpose(0, 1), None).keep, keep.T)
    assert torch.equal(match([mask], x.flatten(0, 1), False).keep, keep.flatten())
    assert torch.equal(match([mask], x.transpose(0, 1).flatten(0, 1), True).keep, keep.T.flatten())
    heads = match([mask], torch.randn(SAMPLES, TOKENS, 7, 2), None).keep
    assert torch.equal(heads, keep[:, :, None].expand(SAMPLES, TOKENS, 7))


@pytest.mark.parametrize(
    "mask",
    [with_empty_slots(KEEP), with_empty_slots(pairs(KEEP)), added(with_empty_slots(pairs(KEEP)))],
    ids=["tokens", "pairs", "added"],
)
def test_masks_of_caches_with_empty_places(mask):
    x = torch.randn(SAMPLES, TOKENS, 2)
    assert torch.equal(match([mask], x, False, past=4).keep, KEEP)
    assert match([mask], x, False, past=None) is None  # which of the places are new is not known


def test_as_many_samples_as_tokens():
    """The axes do not say which is which: known, or the same either way, or not to be told."""
    x = torch.randn(3, 3, 2)
    assert torch.equal(match([SQUARE], x, False).keep, SQUARE)
    assert torch.equal(match([SQUARE], x, True).keep, SQUARE.T)
    assert match([SQUARE], x, None) is None
    assert torch.equal(match([SQUARE & SQUARE.T], x, None).keep, SQUARE & SQUARE.T)
    assert match([torch.ones(3, 3)], x, None).keep is None


@pytest.mark.parametrize(
    ("mask", "x"),
    [
        (KEEP, torch.randn(15, 2)),  # in which order is not known
        (KEEP, torch.randn(7, 2)),
        (KEEP, torch.randn(1, 15, 2)),
        (KEEP, torch.randn(SAMPLES, TOKENS + 2, 2)),  # tokens the model put before or behind them
        (torch.ones(2, 2, 2, 2, 2), torch.randn(2, 2, 2)),
        (~(CAUSAL ^ EYE).expand(SAMPLES, 1, TOKENS, TOKENS), torch.randn(SAMPLES, TOKENS, 2)),  # hidden from themselves
        (pairs(LEFT) | EYE, torch.randn(SAMPLES, TOKENS, 2)),  # one token alone, like its padding
        (pairs(KEEP) | EYE, torch.randn(SAMPLES, TOKENS, 2)),  # padding behind a text that sees itself and the text
        (EYE.expand(SAMPLES, 1, TOKENS, TOKENS), torch.randn(SAMPLES, TOKENS, 2)),
        ("causal", torch.randn(SAMPLES, TOKENS, 2)),
    ],
    ids=range(10),
)
def test_what_cannot_be_told_is_not_guessed(mask, x):
    assert match([mask], x, None) is None


def test_images_of_patches_and_layers_that_are_given_no_padding():
    patches = torch.rand(2, 3, 4) > 0.5
    assert torch.equal(match([patches], torch.randn(2, 12, 5), None).keep, patches.flatten(1))
    assert torch.equal(match([patches.flatten(1)], torch.randn(2, 3, 4, 5), None).keep, patches)
    real = int(KEEP.sum())
    assert match([KEEP], torch.randn(1, real, 2), None).keep is None
    assert match([KEEP], torch.randn(real, 2), None).keep is None


# ---------------------------------------------------------------------- every family


def moments(name, samples, tokens, pad):
    model = text_model(name)
    slots = wrap(model, own_targets(name, model))
    task = [texts(samples, tokens, pad, **more_of(name, samples, tokens, pad))]
    with token_mask(model) as mask:
        return [s.moment for s in feature_statistics(model, slots, task, first_tokens, token_mask=mask)]


SHAPES = pytest.mark.parametrize(("samples", "tokens"), [(4, 8), (8, 8)], ids=["", "square"])


@SHAPES
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.filterwarnings("error:token_mask")
def test_another_pad_token_moves_no_statistic(name, samples, tokens):
    """XLNet's layers and parts of Longformer's see ``[tokens, batch, width]``; Longformer pads by itself; CANINE's see
    groups of four characters; GIT's text stands behind an image; T5's decoder reads its encoder, and FSMT's, tokens
    first, another one with padding of its own; Pegasus-X pads to blocks and has global tokens beside the text's."""
    for a, b in zip(moments(name, samples, tokens, 0), moments(name, samples, tokens, 3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@SHAPES
@pytest.mark.parametrize("name", ["xlnet", "opt", "git", "longformer"])
@pytest.mark.filterwarnings("error:token_mask")
def test_another_pad_token_moves_neither_directions_nor_bases(name, samples, tokens):
    """The gradients' pass needs no mask: the loss does not depend on padding."""
    results = []
    for pad in (0, 3):
        model = text_model(name)
        keeper = keeplora.KeepLora(model, CONFIG, targets=own_targets(name, model))
        task = [texts(samples, tokens, pad, **more_of(name, samples, tokens, pad))]
        keeper.before_task(task, first_tokens)
        rows = [slot.adapter.A.detach() for slot in keeper.slots if slot.adapter is not None]
        keeper.after_task(task)
        results.append([a.T @ a for a in rows] + [q @ q.T for q in (keeper.basis(s.name) for s in keeper.slots)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in MEMBERS if name != "siglip"])
def test_another_pad_token_moves_no_basis_of_a_member(name):
    """SigLIP's texts are the exception: their padding is attended to, as in pretraining."""
    results = []
    for pad in (PAD, 4):
        model, _ = fresh(name)
        task = batches(name, model, 0, count=1)
        ids = task[0]["input_ids"]
        task[0]["input_ids"] = ids.masked_fill(ids == PAD, pad)
        slots = wrap(model, find_targets(model))
        with token_mask(model) as mask:
            statistics = feature_statistics(model, slots, task, families_loss, token_mask=mask)
        results.append([statistic.moment for statistic in statistics])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_caches_with_empty_places():
    """A static cache: the places of the tokens are those behind what is filled, not the last."""
    model = text_model("llama")
    slot = wrap(model, find_targets(model))[0]
    seen = {}
    slot.host.observer = lambda host, inputs: seen.update(x=inputs["weight"])
    batch = texts(3, 8, PAD)
    ids, keep = batch["input_ids"], batch["attention_mask"]
    cache = tf.StaticCache(config=model.config, max_cache_len=20)
    with token_mask(model) as mask, torch.no_grad():
        model(ids[:, :2], attention_mask=keep[:, :2], past_key_values=cache)
        assert mask(slot, seen["x"]) is None
        model(ids[:, 2:6], attention_mask=keep[:, :6], past_key_values=cache)
        assert torch.equal(mask(slot, seen["x"]), keep[:, 2:6].bool())
        allowed = torch.ones(8, 20).tril().bool()[6:] & nn.functional.pad(keep, (0, 12)).bool()[:, None, None, :]
        model(ids[:, 6:], attention_mask=allowed, past_key_values=cache)
        assert torch.equal(mask(slot, seen["x"]), keep[:, 6:].bool())
