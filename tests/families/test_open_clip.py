"""open_clip's own models, built from configurations without weights."""

import copy

import open_clip as clip
import pytest
import timm
import torch
from torch import nn

import keeplora
from keeplora.families import find_targets, open_clip, token_mask
from keeplora.families._open_clip_attention import attention_host
from keeplora.lora import LoraAdapter, Target, depth_positions, select_targets, unwrap, wrap

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
TEXT = {"context_length": 7, "vocab_size": 30, "width": 24, "layers": 2, "heads": 2}


def tiny(cls=clip.model.CLIP, **text):
    return cls(16, VISION, {**TEXT, **text}).eval()


def batch(n=5):
    tokens = torch.randint(1, 20, (n, 7))
    tokens[torch.arange(n), torch.arange(n) % 4 + 2] = 29  # end of text
    for row in tokens:
        row[int(row.argmax()) + 1 :] = 0
    return torch.randn(n, 3, 16, 16), tokens


def loss_fn(model, inputs):
    image, text = model.encode_image(inputs[0], normalize=True), model.encode_text(inputs[1], normalize=True)
    return nn.functional.cross_entropy(model.logit_scale.exp() * image @ text.T, torch.arange(len(image)))


@pytest.mark.parametrize("cls", [clip.model.CLIP, clip.model.CustomTextCLIP])
def test_targets_of_both_towers(cls):
    targets = find_targets(tiny(cls))
    assert len(targets) == (3 + 2) * 6
    assert {t.tower for t in targets} == {"vision", "text"}
    positions = depth_positions(targets)
    assert positions["visual.transformer.resblocks.2.attn.q_proj"] == (2, 3)
    prefix = "text." if cls is clip.model.CustomTextCLIP else ""
    assert positions[f"{prefix}transformer.resblocks.1.mlp.c_proj"] == (1, 2)


def test_timm_towers_have_their_fused_qkv_as_row_ranges():
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "linear", "image_size": 224}
    with torch.device("meta"):
        model = clip.model.CLIP(16, vision, TEXT).eval()
    assert [t for t in find_targets(model) if t.name == "visual.trunk.blocks.3.attn.k_proj"] == [
        Target("visual.trunk.blocks.3.attn.k_proj", "visual.trunk.blocks.3.attn.qkv", "weight", (192, 384), 3, "vision")
    ]
    model = tiny()
    trunk = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=16)
    model.visual = nn.Sequential()
    model.visual.add_module("trunk", trunk.eval())
    targets = find_targets(model)
    x = torch.randn(1, 3, 32, 32)
    before = model.encode_image(x)
    slots = wrap(model, select_targets(targets, ["visual"]))
    assert torch.equal(model.encode_image(x), before)
    for slot in slots:
        out, width = slot.weight.shape
        slot.attach(LoraAdapter(torch.randn(2, width), torch.randn(out, 2), 1.0))
        assert not torch.equal(model.encode_image(x), before), slot.name
        slot.detach()


@pytest.mark.parametrize("separate", [False, True])
def test_evas_fused_projection_is_adapted_though_timm_does_not_call_it(separate):
    model = tiny(clip.model.CustomTextCLIP)
    trunk = timm.create_model("eva_giant_patch14_224", img_size=28, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    for block in trunk.blocks:
        block.attn.qkv_bias_separate = separate
    model.visual = nn.ModuleDict({"trunk": trunk.eval()})
    for name, parameter in model.visual.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    x, state = torch.randn(2, 3, 28, 28), list(model.state_dict())
    before, kinds = trunk(x), [type(module) for module in model.modules()]
    targets = find_targets(model, ["vision"])
    assert [t.name.rsplit(".", 1)[-1] for t in targets[:4]] == ["q_proj", "k_proj", "v_proj", "proj"]
    slots = wrap(model, [*reversed(targets)])
    assert list(model.state_dict()) == state
    assert torch.equal(trunk(x), before)
    for slot in slots:
        out, width = slot.weight.shape
        slot.attach(LoraAdapter(torch.randn(2, width), torch.randn(out, 2), 1.0))
        changed = trunk(x)
        assert not torch.equal(changed, before), slot.name
        assert torch.equal(copy.deepcopy(trunk)(x), changed)
        slot.merge()
        torch.testing.assert_close(trunk(x), changed, rtol=1e-4, atol=1e-4)
        before = trunk(x)
    assert torch.equal(unwrap(model).visual["trunk"](x), before)
    assert [type(module) for module in model.modules()] == kinds


def test_wrapping_changes_no_bit_and_every_adapter_matters():
    model, inputs = tiny(), batch()
    with _slow_path():  # nn.MultiheadAttention has another kernel for inference, equal to rounding
        before = model.encode_image(inputs[0]), model.encode_text(inputs[1])
        slots = wrap(model, find_targets(model))
        after = model.encode_image(inputs[0]), model.encode_text(inputs[1])
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    for slot in slots:  # an adapter that is attached but never applied would be silent
        out, width = slot.weight.shape
        slot.attach(LoraAdapter(torch.randn(2, width), torch.randn(out, 2), 1.0))
        which = 0 if slot.target.tower == "vision" else 1
        changed = (model.encode_image, model.encode_text)[which](inputs[which])
        assert not torch.equal(changed, after[which]), slot.name
        slot.detach()


class _slow_path:
    def __enter__(self):
        self.enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def __exit__(self, *_):
        torch.backends.mha.set_fastpath_enabled(self.enabled)


@pytest.mark.parametrize("pool", ["argmax", "eos"])
@pytest.mark.parametrize("cls", [clip.model.CLIP, clip.model.CustomTextCLIP])
def test_padding_does_not_count(cls, pool):
    model, (_, tokens) = tiny(cls, pool_type=pool, eos_id=29), batch()
    slots = wrap(model, find_targets(model))
    seen = {}

    def watch(host, inputs):
        seen.update({id(host): next(iter(inputs.values()))})

    text = next(s for s in slots if s.target.tower == "text")
    vision = next(s for s in slots if s.target.tower == "vision")
    text.host.observer = watch
    with token_mask(model) as mask:
        model.encode_text(tokens)
        keep = mask(text, seen[id(text.host)])
        assert mask(vision, torch.zeros(5, 5, 32)) is None
    lengths = [int((row == 29).nonzero()[0, 0]) + 1 for row in tokens]
    assert [int(row.sum()) for row in keep] == lengths
    assert all(row[:n].all() for row, n in zip(keep, lengths, strict=True))


def test_padded_tokens_cannot_reach_the_embedding_nor_the_statistic():
    inputs = batch()
    other = (inputs[0], inputs[1].clone())
    for row in other[1]:
        end = int(row.argmax())
        row[end + 1 :] = torch.randint(1, 20, (6 - end,))
    torch.manual_seed(1)
    bases = []
    for data in (inputs, other):
        torch.manual_seed(1)
        model = tiny()
        keeper = keeplora.KeepLora(model, keeplora.KeepLoraConfig(r=2, feature_energy=0.8))
        keeper.before_task([data], loss_fn)
        keeper.after_task([data])
        bases.append([keeper.basis(slot.name) for slot in keeper.slots])
    assert all(torch.equal(a, b) for a, b in zip(*bases, strict=True))


def test_text_depth_scale_is_one_by_default():
    model = tiny()
    keeper = keeplora.KeepLora(model, keeplora.KeepLoraConfig(r=2, alpha=2.0))
    keeper.before_task([batch()], loss_fn)
    scales = {slot.name: slot.adapter.scaling for slot in keeper.slots}
    assert scales["visual.transformer.resblocks.0.attn.q_proj"] == pytest.approx(0.2)
    assert scales["visual.transformer.resblocks.1.attn.q_proj"] == pytest.approx(0.6)
    assert scales["visual.transformer.resblocks.2.attn.q_proj"] == pytest.approx(1.0)
    assert {v for k, v in scales.items() if k.startswith("transformer")} == {1.0}


def test_a_model_inside_a_wrapper_is_still_known():
    class Wrapper(nn.Module):
        def __init__(self, clip_model):
            super().__init__()
            self.clip, self.head = clip_model, nn.Linear(16, 3)

    model = Wrapper(tiny())
    inner = find_targets(model.clip)
    assert [t.name for t in find_targets(model)] == [f"clip.{t.name}" for t in inner]
    assert {t.tower for t in find_targets(model)} == {"vision", "text"}
    keeper = keeplora.KeepLora(model, keeplora.KeepLoraConfig(r=2))
    keeper.before_task([batch()], lambda m, b: loss_fn(m.clip, b))
    assert keeper.after_task([batch()]).leak <= 1e-6


CUSTOM = [
    {},
    {"qk_norm": True},
    {"scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True},
]


def custom(options):
    torch.manual_seed(3)
    vision = {**VISION, "block_type": "custom", **options}
    return clip.model.CLIP(16, vision, {**TEXT, "block_type": "custom", **options}).eval()


@pytest.mark.parametrize("options", CUSTOM, ids=["plain", "normalised", "scaled"])
@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_open_clips_own_attention_block(options, mode):
    model, data = custom(options), batch()
    for name, parameter in model.named_parameters():
        if "scale" in name or "ln_" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = [model.encode_image(data[0]), model.encode_text(data[1])]
    keeper = keeplora.KeepLora(model, keeplora.KeepLoraConfig(r=2, feature_energy=0.5))
    after = [model.encode_image(data[0]), model.encode_text(data[1])]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert len(keeper.slots) == 4 * 5  # three vision blocks, two of text
    keeper.before_task([data], loss_fn)
    for slot in keeper.slots:
        slot.host.forward_mode = mode
        torch.nn.init.normal_(slot.adapter.B, 0.0, 0.3)
    learned = [model.encode_image(data[0]), model.encode_text(data[1])]
    assert not torch.allclose(learned[0], before[0], atol=1e-3)
    assert keeper.after_task([data]).leak <= 1e-6
    merged = [model.encode_image(data[0]), model.encode_text(data[1])]
    for a, b in zip(learned, merged, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    plain = keeper.merge()
    assert {name: type(module) for name, module in plain.named_modules()} == kinds
    assert torch.equal(plain.encode_image(data[0]), merged[0])
    fresh = custom(options)
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh.encode_image(data[0]), merged[0])


def test_cosine_attention_follows_its_formula():
    """open_clip's own forward raises here (bmm of four dimensions), so this is held to the formula."""
    block = clip.transformer.Attention(16, 4, scaled_cosine=True).eval()
    holder = nn.ModuleDict({"attn": block})
    host = attention_host()(holder["attn"])
    x, mask = torch.randn(2, 5, 16), torch.ones(5, 5).triu(1).bool()
    q, k, v = (
        t.double().view(2, 5, 4, 4).transpose(1, 2)
        for t in (x @ block.in_proj_weight.T + block.in_proj_bias).chunk(3, -1)
    )
    logits = (
        nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).mT * block.logit_scale.exp().double()
    )
    heads = logits.masked_fill(mask, float("-inf")).softmax(-1) @ v
    exact = heads.transpose(1, 2).flatten(-2) @ block.out_proj.weight.double().T + block.out_proj.bias.double()
    torch.testing.assert_close(host(x, mask).double(), exact, rtol=1e-5, atol=1e-5)


def test_refuses_what_it_does_not_know():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj_weight = nn.Parameter(torch.zeros(48, 16))

    model = tiny()
    model.visual.transformer.resblocks[0].attn = Own()
    with pytest.raises(TypeError, match=r"Own at visual\.transformer\.resblocks\.0\.attn, which reads its weights"):
        find_targets(model)
    assert not open_clip.owns(nn.Linear(2, 2))
