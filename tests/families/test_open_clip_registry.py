"""Every architecture of open_clip's registry, two blocks deep and without storage: only the structure counts."""

import copy
import re

import open_clip as clip
import pytest
import timm
import torch
import transformers
from open_clip.factory import _MODEL_CONFIGS

from keeplora.families import find_targets
from keeplora.lora import unwrap, wrap

DEPTH, LETTERS = 2, 4
SIZES = ("width", "layers", "heads", "head_width", "image_size", "patch_size", "vocab_size", "context_length")
SIZES += ("mlp_ratio", "embed_dim", "latent_dim", "dim_head", "attn_pooler_heads", "n_queries", "hf_tokenizer_name")
NO_BLOCKS = ("convnext", "fastvit")  # convolutions: their text towers alone are adapted
HF = {
    "roberta-base": transformers.RobertaConfig,
    "xlm-roberta-base": transformers.XLMRobertaConfig,
    "google/mt5-base": transformers.MT5Config,
    "facebook/nllb-200-distilled-600M": transformers.M2M100Config,
}
HF_SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "vocab_size": 40,
    "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": DEPTH, "num_heads": 2, "encoder_layers": DEPTH,
    "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_layers": 1, "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24, "max_position_embeddings": 40,
}  # fmt: skip


def structure(config):
    """What is left of a configuration without its sizes: architectures that agree in it have the same layers."""

    def bare(part):
        rest = {k: v for k, v in part.items() if k not in SIZES}
        name = part.get("timm_model_name", "")
        if name and not name.startswith("eva"):  # the sizes of EVA differ in more than size
            words = r"_(tiny|small|medium|base|x*large2?|giant(opt)?|gigantic|so400m)(?=_|$)|_patch\d+|(?<=mci)\d|_\d+$"
            rest["timm_model_name"] = re.sub(words, "", name)
        if "hf_model_name" in part:
            rest["hf_model_name"] = hf_config(part["hf_model_name"]).__name__
        if isinstance(part.get("layers"), list):
            rest["resnet"] = True
        return sorted(rest.items(), key=str)

    return repr([bare(config["vision_cfg"]), bare(config["text_cfg"]), "multimodal_cfg" in config])


def hf_config(name):
    kind = "xlm-roberta" if "xlm" in name else next(k for k in ("roberta", "mt5", "nllb") if k in name)
    return next(cls for known, cls in HF.items() if kind in known.split("/")[-1])


GROUPS: dict[str, list[str]] = {}
for _name, _config in sorted(_MODEL_CONFIGS.items()):
    GROUPS.setdefault(structure(_config), []).append(_name)


@pytest.fixture
def shallow(monkeypatch):
    """timm's towers two blocks deep; HF's from configurations of our own, as nothing can be downloaded."""
    create = timm.create_model

    def two_deep(name, **options):
        if name.startswith("swin"):
            options["depths"] = (1, 1, 1, 1)
        elif not name.startswith(NO_BLOCKS):
            options["depth"] = DEPTH
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", two_deep)
    monkeypatch.setattr(
        "open_clip.hf_model.AutoConfig.from_pretrained", lambda name: hf_config(name)(**HF_SIZES, is_decoder=False)
    )


def build(name):
    config = copy.deepcopy(_MODEL_CONFIGS[name])
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" not in vision:
        vision["layers"] = DEPTH if isinstance(vision["layers"], int) else [1, 1, 1, 1]
    text["layers"], text["hf_model_pretrained"] = DEPTH, False
    coca = config.pop("multimodal_cfg", None)
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    with torch.device("meta"):
        if coca:
            return clip.CoCa(config["embed_dim"], {**coca, "layers": 1}, text, vision)
        return (clip.CustomTextCLIP if custom else clip.CLIP)(config["embed_dim"], vision, text)


def expected(name):
    """Targets per block of the vision tower and of the text tower."""
    vision, text = _MODEL_CONFIGS[name]["vision_cfg"], _MODEL_CONFIGS[name]["text_cfg"]
    kind = vision.get("timm_model_name", "")
    gated = kind.startswith(("vitamin", "eva02_base", "eva02_large"))
    convolutions = kind.startswith(NO_BLOCKS) or isinstance(vision.get("layers"), list)
    hf = text.get("hf_model_name", "")
    return 0 if convolutions else LETTERS + 2 + gated, LETTERS + 2 + ("mt5" in hf)


def test_the_registry_is_covered():
    assert sum(map(len, GROUPS.values())) == len(_MODEL_CONFIGS) >= 144
    assert len(GROUPS) < 60


@pytest.mark.parametrize("name", [names[0] for names in GROUPS.values()])
def test_every_architecture(name, shallow):
    model = build(name).eval()
    targets = find_targets(model)
    for tower, per_block in zip(("vision", "text"), expected(name), strict=True):
        depths = [t.depth for t in targets if t.tower == tower]
        blocks = 4 if "swin" in name and tower == "vision" else DEPTH
        assert depths == [depth for depth in range(blocks) for _ in range(per_block)], tower
    for block in {t.name.rsplit(".", 2)[0] for t in targets if ".attn." in t.name}:
        assert {t.name.rsplit(".", 1)[-1][:1] for t in targets if t.name.startswith(f"{block}.attn.")} >= set("qkv")

    slots = wrap(model, targets)
    called = set()

    def tap(host, x, y, rows):  # stands in for the layer's output: an adapter of these slots would be part of it
        called.update((host, slot) for slot in rows)
        return y

    for slot in slots:
        slot.host.tap = tap
    size = model.visual.image_size
    model.encode_image(torch.empty(1, 3, *((size, size) if isinstance(size, int) else size), device="meta"))
    device, length = "meta", getattr(model, "context_length", 8)
    if "hf_model_name" in _MODEL_CONFIGS[name]["text_cfg"]:  # transformers looks at the values of its masks
        device, length = "cpu", 8
        model.text.to_empty(device=device)
        for tensor in [*model.text.parameters(), *model.text.buffers()]:
            tensor.detach().zero_()
    model.encode_text(torch.zeros(1, length, dtype=torch.long, device=device))
    silent = [slot.name for slot in slots if (slot.host, slot.slot) not in called]
    assert not silent
    unwrap(model)
    assert find_targets(model) == targets
