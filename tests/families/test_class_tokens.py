"""The token that stands for a sample, in the towers of open_clip's models and elsewhere."""

import open_clip as clip
import pytest
import torch
import transformers as tf
from torch import nn

from keeplora.families.class_tokens import ClassTokens, class_tokens
from keeplora.lora import LoraSlot, linear_targets, wrap
from tests.families.members import VISION, model_of
from tests.families.test_open_clip import batch, tiny


def slot_of(tower):
    model = nn.Sequential(nn.Linear(24, 4))
    (slot,) = wrap(model, linear_targets(model))
    target = type(slot.target)("0", "0", "weight", None, 0, tower)
    return LoraSlot(target, slot.host, slot.slot, slot.parameter, slot.rows)


@pytest.mark.parametrize("cls", [clip.model.CLIP, clip.model.CustomTextCLIP])
def test_images_are_read_at_their_class_token_and_texts_at_their_end(cls):
    model = tiny(cls)
    tokens, handles = class_tokens(model)
    images, texts = batch(5)
    model.encode_image(images), model.encode_text(texts)
    x = torch.randn(5, 7, 24)
    assert torch.equal(tokens.of("vision", x), x[:, 0])
    ends = [row.tolist().index(29) for row in texts]
    assert len(set(ends)) > 1
    assert torch.equal(tokens.of("text", x), torch.stack([x[i, end] for i, end in enumerate(ends)]))
    for handle in handles:
        handle.remove()
    model.encode_text(texts[:2])
    assert torch.equal(tokens.ids, texts)


@pytest.mark.parametrize("tower", ["vision", "text", "model"])
def test_the_mask_shows_the_same_tokens(tower):
    model = tiny()
    tokens, _ = class_tokens(model)
    model.encode_text(batch(5)[1])
    x = torch.randn(5, 7, 24)
    mask = tokens.mask(slot_of(tower), x)
    assert torch.equal(x[mask], tokens.of(tower, x))


def test_towers_without_a_class_token_give_the_mean():
    model = clip.model.CLIP(
        16,
        {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16, "pool_type": "avg"},
        {"context_length": 7, "vocab_size": 30, "width": 24, "layers": 1, "heads": 2},
    )
    tokens, _ = class_tokens(model)
    x = torch.randn(2, 3, 24)
    assert torch.equal(tokens.of("vision", x), x.mean(1))
    assert tokens.mask(slot_of("vision"), x) is None


def test_other_models_give_the_first_token_of_a_sample():
    tokens, handles = class_tokens(nn.Sequential(nn.Linear(4, 4)))
    assert not handles
    rows, grid = torch.randn(3, 4), torch.randn(2, 3, 3, 4)
    assert torch.equal(tokens.of("model", rows), rows)
    assert torch.equal(tokens.of("model", rows[0]), rows[:1])
    assert torch.equal(tokens.of("model", grid), grid[:, 0, 0])
    assert tokens.mask(slot_of("model"), rows) is None
    assert torch.equal(grid[tokens.mask(slot_of("model"), grid)], grid[:, 0, 0])
    assert tokens.mask(slot_of("model"), grid[:0]).shape == (0, *grid.shape[1:-1])


def test_texts_that_are_not_those_embedded_are_refused():
    tokens = ClassTokens({"text": "end"})
    with pytest.raises(RuntimeError, match="got ids None"):
        tokens.of("text", torch.randn(2, 3, 4))
    tokens.remember(nn.Identity(), (torch.zeros(2, 5),), torch.empty(0))
    with pytest.raises(RuntimeError, match=r"got ids \[2, 5\] for inputs \[2, 3, 4\]"):
        tokens.of("text", torch.randn(2, 3, 4))


def test_attention_that_takes_tokens_first_is_refused():
    with pytest.raises(ValueError, match="batch_first=False at '0'"):
        class_tokens(nn.Sequential(nn.MultiheadAttention(4, 2)))


@pytest.mark.parametrize("name", ["clip", "siglip", "llava", "llama"])
def test_models_that_read_texts_at_another_token_are_refused(name):
    with pytest.raises(ValueError, match="another token than its first"):
        class_tokens(model_of(name))


@pytest.mark.parametrize(("cls", "first"), [(tf.ViTModel, True), (tf.SiglipVisionModel, False)])
def test_encoders_of_images_are_read_at_their_class_token_or_their_mean(cls, first):
    sizes = {k: v for k, v in VISION.items() if k != "projection_dim"}
    tokens, handles = class_tokens(cls(cls.config_class(**sizes)))
    x = torch.randn(2, 5, 16)
    assert torch.equal(tokens.of("vision", x), x[:, 0] if first else x.mean(1))
    assert handles == []
