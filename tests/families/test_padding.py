"""Padding never counts: in every family, whatever form a mask has and in whichever order a layer's axes stand."""

import warnings

import pytest
import torch
import transformers as tf
from families.members import CONFIG, LANGUAGE, MEMBERS, PAD, VISION, batches, fresh
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

import keeplora
from keeplora.families import find_targets, token_mask
from keeplora.families._padding import match
from keeplora.lora import linear_targets, wrap
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

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": PAD}
ENCODER = {**SMALL, "intermediate_size": 24, "max_position_embeddings": 40}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
GIT_VISION = {k: v for k, v in VISION.items() if k != "projection_dim"}
TEXTS = {
    "xlnet": lambda: tf.XLNetModel(tf.XLNetConfig(vocab_size=60, d_model=16, n_layer=2, n_head=2, d_inner=24)),
    "longformer": lambda: tf.LongformerModel(tf.LongformerConfig(**ENCODER, attention_window=4)),
    "bert": lambda: tf.BertModel(tf.BertConfig(**ENCODER)),
    "modernbert": lambda: tf.ModernBertModel(tf.ModernBertConfig(**ENCODER)),
    "canine": lambda: tf.CanineModel(tf.CanineConfig(**ENCODER)),
    "opt": lambda: tf.OPTModel(
        tf.OPTConfig(**SMALL, ffn_dim=24, max_position_embeddings=40, word_embed_proj_dim=16, do_layer_norm_before=True)
    ),
    "llama": lambda: tf.LlamaModel(tf.LlamaConfig(**LANGUAGE)),
    "git": lambda: tf.GitModel(tf.GitConfig(**ENCODER, vision_config=GIT_VISION)),
    "t5": lambda: tf.T5Model(tf.T5Config(**T5)),
}  # fmt: skip


def text_model(name):
    torch.manual_seed(5)
    model = TEXTS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, 0.25)
    return model


def texts(samples, tokens, pad, **more):
    """Padded on the right, as encoders are; ``pad`` stands where the mask is 0."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(samples, tokens, dtype=torch.long)
    mask[1, tokens - 1 :], mask[2, 3:] = 0, 0
    ids = torch.randint(5, 58, mask.shape, generator=generator).masked_fill(mask == 0, pad)
    return {"input_ids": ids, "attention_mask": mask} | more


def more_of(name, samples):
    generator = torch.Generator().manual_seed(2)
    if name == "git":
        return {"pixel_values": torch.randn(samples, 3, 8, 8, generator=generator)}
    if name == "t5":
        return {"decoder_input_ids": torch.randint(5, 58, (samples, 4), generator=generator)}
    return {}


def first_tokens(model, batch):
    return model(**batch).last_hidden_state[:, :2].square().mean()


def own_targets(name, model):
    targets = linear_targets(model) if name == "t5" else find_targets(model)
    without = ("_global", "final_char_encoder")  # nothing asks for Longformer's; CANINE's stand behind a convolution
    return [target for target in targets if not any(part in target.name for part in without)]


def moments(name, samples, tokens, pad):
    model = text_model(name)
    slots = wrap(model, own_targets(name, model))
    task = [texts(samples, tokens, pad, **more_of(name, samples))]
    with token_mask(model) as mask:
        return [s.moment for s in feature_statistics(model, slots, task, first_tokens, token_mask=mask)]


SHAPES = pytest.mark.parametrize(("samples", "tokens"), [(4, 8), (8, 8)], ids=["", "square"])


@SHAPES
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.filterwarnings("error:token_mask")
def test_another_pad_token_moves_no_statistic(name, samples, tokens):
    """XLNet's layers and parts of Longformer's see ``[tokens, batch, width]``; Longformer pads by itself; CANINE's see
    groups of four characters; GIT's text stands behind an image; T5's decoder reads its encoder."""
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
        task = [texts(samples, tokens, pad, **more_of(name, samples))]
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


def families_loss(model, batch):
    return model(**batch).logits if "labels" in batch else model(**batch).logits_per_image


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


# ---------------------------------------------------------------------- what the user is told


class Remote(tf.LlamaModel):
    """A model whose code is not the library's: in which order its axes stand is not known."""


def remote():
    torch.manual_seed(5)
    return nn.Sequential(Remote(tf.LlamaConfig(**LANGUAGE)))


def loss_of_first(model, batch):
    return first_tokens(model[0], batch)


def keep_of(batch):
    return lambda slot, x: batch["attention_mask"].bool()


def test_what_cannot_be_told_is_said_once_and_mended_by_the_user():
    bases = {}
    for own in (False, True):
        for pad in (0, 3):
            batch = texts(8, 8, pad)
            options = {"token_mask": keep_of(batch)} if own else {}
            keeper = keeplora.KeepLora(remote(), CONFIG, **options)
            keeper.before_task([batch], loss_of_first)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                keeper.after_task([batch])
            messages = [str(w.message) for w in told if "token_mask" in str(w.message)]
            assert len(messages) == (0 if own else 1)
            assert all("[8, 8] for an input of [8, 8, 16] [0.layers.0.self_attn.q_proj" in m for m in messages)
            q = keeper.basis(keeper.slots[0].name)
            bases[own, pad] = q @ q.T
    torch.testing.assert_close(bases[True, 0], bases[True, 3], rtol=0, atol=1e-5)
    assert (bases[False, 0] - bases[False, 3]).norm() > 1e-3


def test_axes_that_were_told_apart_are_remembered():
    """A batch of another shape before says which axis is which."""
    model = remote()
    slots = wrap(model, find_targets(model))
    batches = [texts(4, 8, PAD), texts(8, 8, PAD)]
    with warnings.catch_warnings(), token_mask(model) as mask:
        warnings.simplefilter("error")
        statistics = feature_statistics(model, slots, batches, loss_of_first, token_mask=mask)
    assert {s.tokens for s in statistics} == {sum(int(b["attention_mask"].sum()) for b in batches)}


def test_masks_that_the_model_does_not_hand_on():
    """RWKV has no use for one, and the user gave one."""
    torch.manual_seed(0)
    model = tf.RwkvForCausalLM(tf.RwkvConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, context_length=16))
    slots, batch = wrap(model, find_targets(model)), texts(3, 8, PAD)
    with token_mask(model) as mask:
        statistics = feature_statistics(model, slots, [batch], lambda model, batch: model(**batch), token_mask=mask)
    assert {s.tokens for s in statistics} == {int(batch["attention_mask"].sum())}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_padded_texts_without_a_mask(name):
    model = text_model(name)
    batch = {"input_ids": texts(3, 8, PAD)["input_ids"]}
    slots = wrap(model, find_targets(model))
    with (
        pytest.warns(UserWarning, match=f"attention_mask, got none .*{type(model).__name__}"),
        token_mask(model) as mask,
    ):
        feature_statistics(model, slots, [batch], first_tokens, token_mask=mask)


@pytest.mark.parametrize("name", ["keeplora", "gpm", "inflora"])
def test_a_method_made_by_its_name_takes_a_mask(name, tmp_path):
    batch, seen = texts(8, 8, PAD), set()

    def mask(slot, x):
        seen.add(slot.name)

    settings = {"target_modules": "all-linear"} | ({} if name == "gpm" else {"r": 2})
    method = keeplora.create(name, remote(), settings, token_mask=mask)
    method.before_task([batch], loss_of_first)
    method.after_task([batch])
    assert seen
    method.save(tmp_path)
    assert keeplora.load(tmp_path, remote(), token_mask=mask).token_mask is mask


@pytest.mark.parametrize("wrong", [torch.ones(8, dtype=torch.bool), torch.ones(8, 8)])
def test_masks_of_the_user_with_other_axes_or_another_dtype_are_refused(wrong):
    batch = texts(8, 8, PAD)
    keeper = keeplora.KeepLora(remote(), CONFIG, token_mask=lambda slot, x: wrong)
    keeper.before_task([batch], loss_of_first)
    with pytest.raises(ValueError, match=r"token_mask must return bool \[8, 8\] .*q_proj"):
        keeper.after_task([batch])
