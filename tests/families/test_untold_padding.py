"""Padding of which no mask tells, and masks that no layer's input fits: the user is told once, in the first pass."""

import re
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers as tf
from families.members import CONFIG, LANGUAGE, PAD, fresh
from families.texts import STACKS, T5, decoded, families_loss, first_tokens, own_targets, text_model, texts
from torch import nn

import keeplora
from keeplora.families import find_targets, token_mask
from keeplora.lora import linear_targets, unwrap, wrap
from keeplora.statistics import feature_statistics


class Remote(tf.LlamaModel):
    """A model whose code is not the library's: in which order its axes stand is not known."""


def remote():
    torch.manual_seed(5)
    return nn.Sequential(Remote(tf.LlamaConfig(**LANGUAGE)))


def loss_of_first(model, batch):
    return first_tokens(model[0], batch)


def keep_of(batch):
    return lambda slot, x: batch["attention_mask"].bool()


@contextmanager
def messages():
    """What is said of masks in a block."""
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    told += [str(w.message) for w in caught if re.match(r"\w+: .*token_mask=", str(w.message))]


@pytest.mark.parametrize("balance", [False, True])
def test_what_cannot_be_told_is_said_once_in_the_first_pass_and_mended_by_the_user(balance):
    """Also of a batch that comes when no more rows are kept for ``balance``."""
    bases = {}
    for own in (False, True):
        for pad in (0, 3):
            batch = texts(8, 8, pad)
            now = {}
            options = {"token_mask": lambda slot, x, now=now: now["attention_mask"].bool()} if own else {}
            keeper = keeplora.KeepLora(remote(), replace(CONFIG, balance=balance), **options)

            def loss(model, batch, now=now):
                now.update(batch)
                return loss_of_first(model, batch)

            whole = {"input_ids": batch["input_ids"].clamp_min(5), "attention_mask": torch.ones(8, 8)}
            task = [whole] * 4 + [batch]
            for first in (True, False):
                with messages() as opening:
                    keeper.before_task(task, loss)
                with messages() as closing:
                    keeper.after_task(task)
                assert len(opening) == (first and not own)
                assert all("[8, 8] for an input of [8, 8, 16] [0.layers.0.self_attn.q_proj" in m for m in opening)
                assert closing == []
            q = keeper.basis(keeper.slots[0].name)
            bases[own, pad] = q @ q.T
    torch.testing.assert_close(bases[True, 0], bases[True, 3], rtol=0, atol=1e-5)
    assert (bases[False, 0] - bases[False, 3]).norm() > 1e-3


def test_nothing_is_said_where_no_features_are_counted():
    config = replace(CONFIG, feature_source="gradients", balance=False)
    keeper = keeplora.KeepLora(remote(), config)
    with messages() as told:
        keeper.before_task([texts(8, 8, PAD)], loss_of_first)
        keeper.after_task([texts(8, 8, PAD)])
    assert told == []


def test_the_peft_route_says_it_when_a_task_opens_and_remembers_the_mask():
    from peft import LoraConfig, get_peft_model

    batch, bases = texts(8, 8, 3), {}
    for own in (False, True):
        model = get_peft_model(remote(), LoraConfig(r=2, target_modules=["q_proj"]))
        config = keeplora.KeepLoraConfig(weight_energy=0.3, feature_energy=0.9)
        options = {"token_mask": keep_of(batch)} if own else {}

        def loss(model, batch):
            return first_tokens(model.base_model.model[0], batch)

        with messages() as opening:
            state = keeplora.initialize(model, [batch], loss, config=config, **options)
        with messages() as closing:
            keeplora.update_subspace(model, [batch], state)
        assert (len(opening), len(closing)) == (not own, 0)
        bases[own] = next(iter(state.bases.values()))
    assert bases[False].shape != bases[True].shape or (bases[False] - bases[True]).norm() > 1e-3


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


@pytest.mark.parametrize(
    ("name", "inner", "stack"),
    [
        ("bert", "BertModel", ""),
        ("llama", "LlamaModel", ""),
        ("fsmt", "FSMTDecoder", "decoder."),  # no model of the library's own, and tokens first
        ("bart", "BartDecoder", "decoder."),  # as long as its encoder's text
        ("t5", "T5Stack", "decoder."),
    ],
)
def test_padded_texts_without_a_mask(name, inner, stack):
    model = text_model(name)
    model.config.use_cache = True  # FSMT masks the padding of its decoder by itself otherwise
    batch = texts(4, 8, PAD)
    if stack:
        batch["decoder_input_ids"] = decoded(4, 8, PAD)["decoder_input_ids"]
    else:
        del batch["attention_mask"]
    for part, told_of in ((stack, 1), *([("encoder.", 0)] if stack else [])):  # of layers that are adapted alone
        slots = wrap(model, [t for t in own_targets(name, model) if t.name.startswith(part)])
        for again in range(2):
            with messages() as told, token_mask(model) as mask:
                statistics = feature_statistics(model, slots, [batch], first_tokens, token_mask=mask)
            assert len(told) == (told_of and not again)
            assert all(f"attention_mask, got none for the pad tokens that {inner} was given [{part}" in m for m in told)
            assert all("token_mask=" in m for m in told)
        unwrap(model)
        if part == stack:
            assert statistics[0].tokens == 4 * 8


def test_padded_texts_without_a_mask_that_reach_a_language_model_as_embeddings():
    model, tasks = fresh("llava")
    batch = {name: value for name, value in tasks[0][0].items() if name != "attention_mask"}
    slots = wrap(model, find_targets(model, ["language", "vision"]))
    with messages() as told, token_mask(model) as mask:
        feature_statistics(model, slots, [batch], families_loss, token_mask=mask)
    assert len(told) == 1
    assert "LlavaModel was given [model.language_model.layers.0" in told[0]


def test_masks_that_a_decoder_does_not_hand_on():
    """FSMT with a cache gives its decoder no mask of padding."""
    model = text_model("fsmt")
    model.config.use_cache = True
    slots = wrap(model, own_targets("fsmt", model))
    batch = texts(4, 8, PAD) | decoded(4, 8, PAD)
    with messages() as told, token_mask(model) as mask:
        statistics = feature_statistics(model, slots, [batch], first_tokens, token_mask=mask)
    assert told == []
    real = {part: int(batch[f"{part}attention_mask"].sum()) for part in ("", "decoder_")}
    for slot, statistic in zip(slots, statistics, strict=True):
        reads_encoder = (
            slot.name.startswith("encoder.") or "encoder_attn.k" in slot.name or "encoder_attn.v" in slot.name
        )
        assert statistic.tokens == real["" if reads_encoder else "decoder_"]


@pytest.mark.parametrize(
    ("globals_", "told_of"), [(3, 0), (12, 1)], ids=["other than the text's", "as many as the text's, padded to blocks"]
)
def test_global_tokens_beside_those_of_a_text(globals_, told_of):
    """Pegasus-X's layers see the text, padded to blocks, and global tokens, which all count."""
    torch.manual_seed(5)
    config = tf.PegasusXConfig(**STACKS, block_size=6, num_global_tokens=globals_)
    model = tf.PegasusXModel(config).encoder.eval()
    slots, batch = wrap(model, linear_targets(model)), texts(4, 8, PAD)
    with messages() as told, token_mask(model) as mask:
        statistics = feature_statistics(model, slots, [batch], first_tokens, token_mask=mask)
    assert len(told) == told_of
    assert all("[4, 12] for an input of [4, 12, 16] [layers.0" in m for m in told)
    if not told_of:
        assert {s.tokens for s in statistics} == {int(batch["attention_mask"].sum()) + 4 * globals_}


def test_layers_that_see_a_text_in_another_form_are_told():
    """LongT5's sums of blocks, ProphetNet's streams of n-grams."""
    long = tf.LongT5Config(**T5, local_radius=3, encoder_attention_type="transient-global", global_block_size=4)
    model = tf.LongT5Model(long).encoder.eval()
    slots = wrap(model, linear_targets(model))
    with messages() as told, token_mask(model) as mask:
        feature_statistics(model, slots, [texts(4, 10, PAD)], first_tokens, token_mask=mask)
    assert len(told) == 1
    assert "[4, 10] for an input of [4, 2, 16] [block.0.layer.0.TransientGlobalSelfAttention.k]" in told[0]


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


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("wrong", [torch.ones(8, dtype=torch.bool), torch.ones(8, 8)])
def test_masks_of_the_user_with_other_axes_or_another_dtype_are_refused_before_anything_is_trained(wrong, balance):
    batch = texts(8, 8, PAD)
    keeper = keeplora.KeepLora(remote(), replace(CONFIG, balance=balance), token_mask=lambda slot, x: wrong)
    with pytest.raises(ValueError, match=r"token_mask must return bool \[8, 8\] .*q_proj"):
        keeper.before_task([batch], loss_of_first)
    assert not keeper.training_task


def test_a_mask_that_no_longer_fits_is_refused_when_the_task_is_closed():
    batch, fits = texts(8, 8, PAD), torch.ones(8, 8, dtype=torch.bool)
    now = [fits]
    keeper = keeplora.KeepLora(remote(), CONFIG, token_mask=lambda slot, x: now[0])
    keeper.before_task([batch], loss_of_first)
    now[0] = fits[0]
    with pytest.raises(ValueError, match=r"token_mask must return bool \[8, 8\] .*q_proj"):
        keeper.after_task([batch])
    now[0] = fits
    keeper.after_task([batch])
