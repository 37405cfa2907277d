"""transformers' families: which layers are adapted, in which towers, and what is refused."""

import pytest
import torch
import transformers as tf
from families.members import CONFIG, LANGUAGE, MEMBERS, TEXT, VISION, fresh, learn, loss_fn, start
from torch import nn

import keeplora
from keeplora.families import find_targets, token_mask
from keeplora.lora import depth_positions, select_targets

NAMES = list(MEMBERS)


@pytest.mark.parametrize("name", NAMES)
def test_targets_towers_and_depths(name):
    model, _ = start(name)
    targets = find_targets(model)
    kinds = MEMBERS[name].kinds
    assert {tower: sum(t.tower == tower for t in targets) for tower in {t.tower for t in targets}} == kinds
    assert set(depth_positions(targets).values()) == {(0, 2), (1, 2)}
    last = {t.name.rsplit(".", 1)[-1] for t in targets}
    if "language" in kinds:
        assert last == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert len(select_targets(targets, "attn")) == 8  # what others call self_attn
    else:
        assert last == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    modules = dict(model.named_modules())
    assert all(type(modules[t.module]) is nn.Linear for t in targets)


@pytest.mark.parametrize(
    ("name", "count"),
    [("llava", 12), ("llava-next-video", 12), ("video-llava", 24), ("qwen2-vl", 12), ("qwen2.5-vl", 14)],
)
def test_vision_towers_where_they_are_asked_for(name, count):
    model, tasks = fresh(name)
    vision = find_targets(model, ["vision"])
    assert len(vision) == count
    assert {t.tower for t in vision} == {"vision"}
    assert not any("projector" in t.name or "merger" in t.name for t in vision)
    names = {t.name.rsplit(".", 1)[-1] for t in vision}
    assert {"q_proj", "k_proj", "v_proj"} <= names
    config = keeplora.KeepLoraConfig(
        r=2, target_modules="all-linear", towers=("language", "vision"), feature_energy=0.4, weight_energy=0.3
    )
    keeper = keeplora.KeepLora(model, config)
    assert len(keeper.slots) == count + 14
    assert learn(keeper, tasks[0]).leak <= 1e-6


@pytest.mark.parametrize("name", ["llava", "video-llava", "qwen2-vl"])
def test_vision_tower_and_projector_stay_frozen(name):
    model, tasks = fresh(name)
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # as from_pretrained leaves them
    before = {key: value.clone() for key, value in model.state_dict().items()}
    keeper = keeplora.KeepLora(model, CONFIG)
    keeper.before_task(tasks[0], loss_fn)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {key for key in dict(model.named_parameters()) if key.endswith(".B")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)  # all of them: frozen ones have no gradient
    loss_fn(model, tasks[0][0]).backward()
    optimizer.step()
    keeper.after_task(tasks[0])
    after = keeper.merge().state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed
    assert changed <= {f"{t.name}.weight" for t in find_targets(model)}


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        # an audio tower beside the language model
        (
            lambda: tf.Qwen2AudioForConditionalGeneration(
                tf.Qwen2AudioConfig(
                    audio_config={"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2,
                                  "encoder_ffn_dim": 24, "num_mel_bins": 8, "max_source_positions": 8},
                    text_config={"model_type": "qwen2", **LANGUAGE},
                )
            ),
            {"language": 14},
        ),
        # a bridge with cross-attention between the towers
        (
            lambda: tf.Blip2ForConditionalGeneration(
                tf.Blip2Config(
                    vision_config=VISION,
                    qformer_config={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                                    "intermediate_size": 24, "encoder_hidden_size": 16, "vocab_size": 60},
                    text_config={"model_type": "llama", **LANGUAGE}, num_query_tokens=2, image_token_id=50,
                )
            ),
            {"language": 14},
        ),
        # a language model called text_model
        (
            lambda: tf.SmolVLMForConditionalGeneration(
                tf.SmolVLMConfig(
                    vision_config={**VISION, "model_type": "smolvlm_vision"},
                    text_config={"model_type": "llama", **LANGUAGE}, image_token_id=50, pad_token_id=0,
                )
            ),
            {"language": 14},
        ),
        (lambda: tf.CLIPForImageClassification(tf.CLIPConfig(text_config=TEXT, vision_config=VISION)), {"vision": 12}),
        (lambda: tf.CLIPTextModelWithProjection(tf.CLIPTextConfig(**TEXT)), {"text": 12}),
        (lambda: tf.BertModel(tf.BertConfig(**{k: v for k, v in TEXT.items() if "proj" not in k})), {"model": 12}),
        (lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION)), {"vision": 12}),
    ],
    ids=["audio", "bridge", "text_model", "clip-vision", "clip-text", "bert", "vit"],
)  # fmt: skip
def test_nothing_else_is_taken_for_a_tower(build, targets):
    with torch.device("meta"):
        model = build()
    found = find_targets(model)
    assert {tower: sum(t.tower == tower for t in found) for tower in {t.tower for t in found}} == targets
    assert not any(part in t.name for t in found for part in ("audio", "qformer", "connector", "projector", "head"))


def test_cross_attention_is_left_out():
    text = {**LANGUAGE, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    with torch.device("meta"):
        model = tf.MllamaForConditionalGeneration(
            tf.MllamaConfig(
                text_config=text, image_token_index=50,
                vision_config={"hidden_size": 16, "intermediate_size": 24, "attention_heads": 2, "image_size": 8,
                               "patch_size": 4, "num_hidden_layers": 1, "num_global_layers": 1, "vision_output_dim": 32,
                               "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
            )
        )  # fmt: skip
    names = [t.name for t in find_targets(model)]
    assert len(names) == 4 + 3 + 3  # one block of self-attention, two MLPs
    assert not any("cross" in name for name in names)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: tf.T5ForConditionalGeneration(
                tf.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
            ),
            r"got T5ForConditionalGeneration. Pass targets",
        ),
        (
            lambda: tf.ClapModel(
                tf.ClapConfig(
                    text_config={"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 24},
                    audio_config={"depths": [1, 1]},
                )
            ),
            "got ClapModel. Pass targets",
        ),
        (
            lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=1, n_head=2)),
            "got GPT2LMHeadModel with none .*Conv1D",
        ),
    ],
    ids=["encoder-decoder", "audio-text", "conv1d"],
)  # fmt: skip
def test_models_of_other_kinds_are_refused(build, message):
    with torch.device("meta"):
        model = build()
    with pytest.raises(ValueError, match=message):
        find_targets(model)
    with token_mask(model):
        pass


def test_towers_the_model_does_not_have():
    with pytest.raises(ValueError, match=r"got 'text' of LlavaForConditionalGeneration. It has vision, language"):
        find_targets(start("llava")[0], ["text"])
    with pytest.raises(ValueError, match=r"towers must .*got 'vision'. It has model"):
        find_targets(nn.Sequential(nn.Linear(2, 2)), ["vision"])
    with pytest.raises(ValueError, match=r"each tower once, got '\w+' twice \(a, b\)"):
        find_targets(nn.ModuleDict({"a": fresh("clip")[0], "b": fresh("clip")[0]}))
    with pytest.raises(ValueError, match=r"towers must .*got \(\)"):
        keeplora.KeepLoraConfig(towers=())
