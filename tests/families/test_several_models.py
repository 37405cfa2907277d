"""A model of two libraries' models: an image encoder and a text encoder side by side, each a tower."""

import functools

import pytest
import torch
import transformers as tf
from torch import nn

from keeplora.families import find_targets, token_mask
from keeplora.families.class_tokens import class_tokens
from keeplora.lora import depth_positions, select_targets, wrap
from keeplora.methods.registry import METHODS, create
from keeplora.statistics import feature_statistics
from keeplora.tasks.classification import Batch, classification_loss
from keeplora.tasks.clip_b16 import ImageTextEncoder
from tests.families.members import LANGUAGE, VISION, model_of
from tests.methods.contract import SMALL, learn

TEXT = {k: v for k, v in LANGUAGE.items() if k != "num_key_value_heads"} | {"hidden_dropout_prob": 0.0}


@functools.cache
def batches():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [11, 0, 0, 0]])  # 0 is padding

    def batch():
        images = torch.randint(0, 256, (8, 3, 8, 8), generator=generator).to(torch.uint8)
        return Batch(images, torch.arange(8) % 3, tokens)

    return [batch() for _ in range(3)]


def two_models(first="vision"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**VISION))
        text = tf.BertModel(tf.BertConfig(**TEXT, attention_probs_dropout_prob=0.0), add_pooling_layer=False)
        model = ImageTextEncoder(vision, text, torch.randn(16, 8), torch.zeros(8), 1.0).eval()
    if first == "text":
        model._modules["vision"] = model._modules.pop("vision")
    return model


def test_each_is_a_tower_of_its_own_depths():
    targets = find_targets(two_models())
    assert {t.name.partition(".")[0]: t.tower for t in targets} == {"vision": "vision", "text": "text"}
    assert {tower: sum(t.tower == tower for t in targets) for tower in ("vision", "text")} == {"vision": 12, "text": 12}
    assert set(depth_positions(targets).values()) == {(0, 2), (1, 2)}
    assert all(isinstance(two_models().get_submodule(t.module), nn.Linear) for t in targets)
    assert find_targets(two_models(), ["text"]) == [t for t in targets if t.tower == "text"]
    with pytest.raises(ValueError, match=r"towers must .*got 'language'. It has text, vision"):
        find_targets(two_models(), ["language"])


def test_a_language_model_beside_them_is_a_third():
    model = nn.ModuleDict({"pair": model_of("clip"), "writer": model_of("llama")})
    assert {t.tower for t in find_targets(model)} == {"vision", "text", "language"}


@pytest.mark.parametrize("names", [("clip", "clip"), ("clip", "siglip"), ("llama", "llama")])
def test_two_towers_of_one_name_are_refused(names):
    model = nn.ModuleDict({f"m{i}": model_of(name) for i, name in enumerate(names)})
    with pytest.raises(ValueError, match=r"twice \(m0, m1\).*pass targets"):
        find_targets(model)
    with token_mask(model) as mask:  # which is for targets of one's own
        assert mask is not None


@pytest.mark.parametrize("own_targets", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_two_tasks(name, own_targets):
    model = two_models()
    if own_targets and "target_modules" not in METHODS[name].config.__dataclass_fields__:
        pytest.skip("adapts no chosen weights")
    targets = find_targets(model) if own_targets else None
    method = create(name, model, SMALL.get(name, {}), targets=targets, progress=False)
    for _ in range(2):
        learn(method, batches(), 1, classification_loss)


@pytest.mark.parametrize("first", ["vision", "text"])
def test_padding_is_no_feature_and_patches_are(first):
    """The rows that count are those of the tokens, whichever of the models comes first."""
    model = two_models(first)
    slots = wrap(model, select_targets(find_targets(model), ["v_proj", "value"]))
    with token_mask(model) as mask:
        counted = feature_statistics(model, slots, batches(), classification_loss, token_mask=mask)
    for slot, statistic in zip(slots, counted, strict=True):
        images, words = 3 * 8 * 5, 3 * 7  # four patches and a class token; 4 + 2 + 1 words
        assert statistic.tokens == (images if slot.target.tower == "vision" else words), slot.name


@pytest.mark.parametrize("first", ["vision", "text"])
def test_images_are_read_at_their_class_token_whatever_comes_first(first):
    tokens, handles = class_tokens(two_models(first))
    x = torch.randn(2, 5, 16)
    assert torch.equal(tokens.of("vision", x), x[:, 0])
    assert torch.equal(tokens.of("text", x), x[:, 0])
    assert not handles
