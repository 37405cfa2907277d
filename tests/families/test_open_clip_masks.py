"""Which text tokens of open_clip's towers count as features: those that reach the text embedding, by its gradient."""

import open_clip as clip
import pytest
import torch
import transformers
from torch import nn

from keeplora.families import find_targets, token_mask
from keeplora.lora import wrap

TOKENS = torch.tensor(
    [[2, 7, 9, 29, 0, 0, 0], [2, 5, 29, 0, 0, 0, 0], [2, 11, 3, 4, 6, 29, 0], [2, 8, 7, 5, 6, 13, 29]]
)
TEXT = {"context_length": 7, "vocab_size": 30, "width": 24, "layers": 2, "heads": 2, "pad_id": 0, "eos_id": 29}
VARIANTS = {
    "up to the highest id": {"pool_type": "argmax"},
    "up to eos_id": {"pool_type": "eos"},
    "CoCa's class token": {"embed_cls": True},
    "CoCa's class token, mask corrected": {"embed_cls": True, "correct_cls_mask": True},
    "padding masked, pooled first": {"no_causal_mask": True, "use_pad_mask": True, "pool_type": "first"},
    "padding masked, pooled last": {"no_causal_mask": True, "use_pad_mask": True, "pool_type": "last"},
    "everything attended to": {"no_causal_mask": True, "pool_type": "last"},
}


def text_tower(name):
    torch.manual_seed(3)
    if name != "HF":
        return clip.transformer.TextTransformer(**TEXT, **VARIANTS[name], output_dim=16)
    config = transformers.RobertaConfig(
        vocab_size=30, hidden_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return clip.hf_model.HFTextEncoder("", 16, config=config, pooler_type="mean_pooler", proj_type="linear")


def tower_in_clip(text):
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    sizes = {k: v for k, v in TEXT.items() if k not in ("pad_id", "eos_id")}
    model = clip.model.CustomTextCLIP(16, vision, sizes)
    model.text = text
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, 0.3)  # initial values are so small that gradients vanish
    return model.eval()


def reaching(model, embedding):
    """By token whether the text embedding has a gradient to the token's vector."""
    vectors = []

    def watch(_module, _args, output):
        vectors.append(output.detach().requires_grad_())
        return vectors[0]

    handle = embedding.register_forward_hook(watch)
    model.encode_text(TOKENS).square().sum().backward()
    handle.remove()
    return vectors[0].grad.abs().sum(-1) > 0


@pytest.mark.parametrize("name", [*VARIANTS, "HF"])
def test_the_tokens_that_count_are_those_that_reach_the_embedding(name):
    text = text_tower(name)
    model = tower_in_clip(text)
    embedding = text.transformer.embeddings.word_embeddings if name == "HF" else text.token_embedding
    expected = reaching(model, embedding)
    if name.startswith("CoCa"):  # stands behind the text and is what is read
        expected = torch.cat([expected, torch.ones(len(expected), 1, dtype=torch.bool)], 1)
    slots = [slot for slot in wrap(model, find_targets(model)) if slot.target.tower == "text"]
    seen = {}
    for slot in slots:
        slot.host.observer = lambda host, inputs: seen.update({host: next(iter(inputs.values()))})
    with token_mask(model) as mask, torch.no_grad():
        model.encode_text(TOKENS)
        for slot in slots:
            keep = mask(slot, seen[slot.host])
            keep = torch.ones_like(expected) if keep is None else keep
            assert torch.equal(keep, expected), slot.name
    assert expected.all() == (name == "everything attended to")


@pytest.mark.parametrize("texts", [TOKENS, TOKENS.repeat(2, 1)[:7]], ids=["", "square"])
def test_towers_whose_layers_see_tokens_first(texts):
    torch.manual_seed(3)
    text = clip.transformer.TextTransformer(**TEXT, pool_type="argmax", output_dim=16)
    text.transformer = clip.transformer.Transformer(24, layers=2, heads=2, batch_first=False)
    model = tower_in_clip(text)
    slot = next(slot for slot in wrap(model, find_targets(model)) if slot.target.tower == "text")
    seen = {}
    slot.host.observer = lambda host, inputs: seen.update(x=next(iter(inputs.values())))
    with token_mask(model) as mask, torch.no_grad():
        model.encode_text(texts)
        keep = mask(slot, seen["x"])
    last = texts.argmax(1, keepdim=True)
    assert torch.equal(keep, (torch.arange(7) <= last).T)
