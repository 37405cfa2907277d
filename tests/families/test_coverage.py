"""What is left out of a model is said: stacks that are not found, weights that are no layers, blocks passed over."""

import copy
import re
import warnings

import open_clip
import pytest
import torch
import transformers as tf
from families.members import LANGUAGE, MEMBERS, TEXT, VISION, start
from torch import nn

import keeplora
from keeplora.families import find_targets
from keeplora.families.coverage import Targets
from keeplora.lora import linear_targets

IMAGES = {k: v for k, v in VISION.items() if k != "projection_dim"}
EXPERTS = {**LANGUAGE, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}


def on_meta(build):
    with torch.device("meta"):
        return build()


def mixture():
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**EXPERTS))


def gpt_oss():
    return tf.GptOssForCausalLM(tf.GptOssConfig(**LANGUAGE, num_local_experts=4, num_experts_per_tok=2, head_dim=8))


def mixtral():
    return tf.MixtralForCausalLM(tf.MixtralConfig(**LANGUAGE, num_local_experts=4))


def longcat():
    """Experts with a forward of their own: some of them do nothing."""
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 24,
             "expert_ffn_hidden_size": 24, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2,
             "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}  # fmt: skip  # noqa: E501
    return tf.LongcatFlashForCausalLM(tf.LongcatFlashConfig(**sizes))


def next_hybrid():
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
             "linear_value_head_dim": 8, "shared_expert_intermediate_size": 24}  # fmt: skip
    return tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(**{**EXPERTS, "num_hidden_layers": 4}, **heads))


def jamba(experts=1):
    return tf.JambaForCausalLM(
        tf.JambaConfig(**LANGUAGE, num_experts=experts, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1,
                       mamba_dt_rank=4, use_mamba_kernels=False)
    )  # fmt: skip


def git():
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return tf.GitForCausalLM(tf.GitConfig(**sizes, intermediate_size=24, vision_config=IMAGES))


def xlm():
    return tf.XLMModel(tf.XLMConfig(vocab_size=60, emb_dim=16, n_layers=2, n_heads=2))


def canine():
    sizes = {k: v for k, v in TEXT.items() if k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    return tf.CanineModel(tf.CanineConfig(**sizes, num_attention_heads=2))


def lxmert():
    return tf.LxmertModel(tf.LxmertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=24, vocab_size=60))


def bridgetower():
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}  # 64 for each head
    text = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 24}  # fmt: skip
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return tf.BridgeTowerModel(tf.BridgeTowerConfig(**sizes, vision_config=vision, text_config=text))


def funnel():
    return tf.FunnelModel(
        tf.FunnelConfig(vocab_size=60, d_model=16, d_head=8, n_head=2, d_inner=24, block_sizes=[1, 1])
    )  # fmt: skip


def clipseg():
    config = tf.CLIPSegConfig(
        text_config=TEXT, vision_config=VISION, projection_dim=8, reduce_dim=16, extract_layers=[0, 1],
        decoder_num_attention_heads=2, decoder_intermediate_size=48,
    )  # fmt: skip
    return tf.CLIPSegForImageSegmentation(config)


def blip2():
    text = {"model_type": "opt", "vocab_size": 60, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "word_embed_proj_dim": 16}  # fmt: skip
    former = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
              "encoder_hidden_size": 16, "vocab_size": 60}  # fmt: skip
    return tf.Blip2ForConditionalGeneration(
        tf.Blip2Config(vision_config=VISION, text_config=text, qformer_config=former, num_query_tokens=2)
    )


def keeper_of(model, modules="all-linear", **options):
    """A keeper, and what it said."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        keeper = keeplora.KeepLora(model, keeplora.KeepLoraConfig(r=2, target_modules=modules), **options)
    return keeper, [str(w.message) for w in told if str(w.message).startswith("KeepLora: ")]


def in_blocks(model):
    """How many numbers the matrices in lists of blocks hold, and how many of them experts do."""
    matrices = {n: p for n, p in model.named_parameters() if p.dim() > 1 and ".layers." in n}
    experts = sum(p.numel() for n, p in matrices.items() if ".experts." in n)
    return sum(p.numel() for p in matrices.values()), experts


@pytest.mark.parametrize("build", [mixture, gpt_oss, mixtral, next_hybrid])
def test_fused_experts_are_reached(build):
    model = on_meta(build)
    everything, experts = in_blocks(model)
    keeper, told = keeper_of(model)
    assert not told
    reached = sum(kind.share for kind in keeper.targets.kinds if kind.state == "adapted" and "experts" in kind.kind)
    assert reached == pytest.approx(experts / everything, rel=0.06)  # in_blocks counts biases of experts, too
    assert keeper_of(on_meta(build), ["attn"])[1] == []  # as asked for


def test_weights_of_unknown_experts_are_said_to_be_left_out():
    model = on_meta(longcat)
    everything, experts = in_blocks(model)
    keeper, told = keeper_of(model)
    assert len(told) == 1
    assert "'language'" in told[0]
    assert "experts.gate_up_proj" in told[0]
    left = sum(kind.share for kind in keeper.targets.kinds if kind.state == "left out" and "experts" in kind.kind)
    assert left == pytest.approx(experts / everything)
    share = float(told[0].split("%")[0].split(": ")[1]) / 100
    assert left - 0.005 <= share <= left + 0.05
    assert keeper_of(on_meta(longcat), ["attn"])[1] == []


def test_experts_that_are_a_models_own_parameters():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.out = nn.Parameter(torch.randn(4, 8, 8)), nn.Linear(8, 8)

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Experts() for _ in range(2))

    keeper, told = keeper_of(Mixture())
    assert len(told) == 1
    assert "80% of the weights" in told[0]
    assert keeper.targets.share == pytest.approx(0.2)
    assert keeper_of(Mixture(), targets=linear_targets(Mixture()))[1] == []  # chosen by the user


def test_linear_attention_is_attention_and_blocks_without_any_are_named():
    keeper, told = keeper_of(on_meta(next_hybrid), ("attn",))
    assert told == []
    assert {t.depth for t in keeper.targets} == {0, 1, 2, 3}
    _, told = keeper_of(on_meta(jamba), ("attn",))
    assert len(told) == 1
    assert "1 of 2 blocks of model.layers" in told[0]
    assert "model.layers.0" in told[0]
    assert keeper_of(on_meta(jamba), ("layers.1.self_attn",))[1] == []  # one block was asked for


def test_state_space_blocks_are_adapted_and_trained():
    torch.manual_seed(0)
    model = jamba()
    ids = torch.randint(3, 50, (3, 9))
    task = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    keeper, _ = keeper_of(model)
    names = {t.name.rpartition(".")[2] for t in keeper.targets if ".mamba." in t.name}
    assert names == {"in_proj", "x_proj", "out_proj"}  # dt_proj's weight is read without a call
    keeper.before_task(task, lambda model, batch: model(**batch).loss)
    assert keeper.after_task(task).leak <= 1e-6


@pytest.mark.parametrize(
    ("build", "towers", "counts"),
    [
        (git, None, {"language": 12}),
        (git, ["language", "vision"], {"language": 12, "vision": 12}),
        (xlm, None, {"model": 12}),
        (canine, None, {"model": 6 + 12 + 6}),
    ],
    ids=["git", "git both", "xlm", "canine"],
)
def test_every_stack_of_a_family_is_found(build, towers, counts):
    """GIT's text stands beside its images, XLM's blocks are in halves, CANINE reads characters before and after."""
    targets = find_targets(on_meta(build), towers)
    assert {tower: sum(t.tower == tower for t in targets) for tower in counts} == counts
    assert {t.tower for t in targets} == set(counts)
    assert sorted({t.depth for t in targets}) == [0, 1, *([2, 3] if build is canine else [])]


def test_depths_go_on_from_stack_to_stack():
    vision = {"hidden_size": 16, "intermediate_size": 24, "attention_heads": 2, "image_size": 8, "patch_size": 4,
              "num_hidden_layers": 3, "num_global_layers": 2, "vision_output_dim": 32,
              "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}  # fmt: skip
    text = {**LANGUAGE, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = tf.MllamaConfig(text_config=text, image_token_index=50, vision_config=vision)
    targets = find_targets(on_meta(lambda: tf.MllamaForConditionalGeneration(config)), ["vision"])
    depth_of = {re.search(r"vision_model\.(.*layers\.\d+)", t.name)[1]: t.depth for t in targets}
    assert depth_of == {f"transformer.layers.{i}": i for i in range(3)} | {
        f"global_transformer.layers.{i}": 3 + i for i in range(2)
    }


@pytest.mark.parametrize(
    "build",
    [
        lambda: tf.Blip2ForConditionalGeneration(
            tf.Blip2Config(
                vision_config=VISION, text_config={"model_type": "t5", **T5}, num_query_tokens=2, image_token_id=50,
                qformer_config={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                                "intermediate_size": 24, "encoder_hidden_size": 16, "vocab_size": 60},
            )
        ),
        lambda: tf.Florence2ForConditionalGeneration(
            tf.Florence2Config(
                text_config={"model_type": "bart", "vocab_size": 60, "d_model": 16, "encoder_layers": 1,
                             "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                             "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
            )
        ),
    ],
    ids=["blip-2 on t5", "florence"],
)  # fmt: skip
def test_language_models_of_two_stacks_are_refused(build):
    with pytest.raises(ValueError, match=r"got (Blip2|Florence2)ForConditionalGeneration\. Pass targets"):
        find_targets(on_meta(build))


def test_stacks_beside_those_of_a_tower_count_as_left_out():
    keeper, told = keeper_of(on_meta(lxmert))
    left = {kind.kind: kind.share for kind in keeper.targets.kinds if kind.state == "left out"}
    assert set(left) == {"layer", "r_layers"}
    assert len(told) == 1
    assert f"{sum(left.values()):.0%} of the weights" in told[0]


@pytest.mark.parametrize(
    ("build", "stacks"),
    [
        (bridgetower, ["cross_modal_image_layers", "cross_modal_text_layers"]),
        (funnel, ["decoder.layers"]),
        (clipseg, ["decoder.layers"]),
    ],
)
def test_stacks_of_no_known_tower_are_said_once_with_their_share(build, stacks):
    model = on_meta(build)
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    for modules in ("all-linear", ("attn",)):
        keeper, told = keeper_of(on_meta(build), modules)
        told = [message for message in told if "no known tower" in message]
        assert len(told) == 1
        assert all(stack in told[0] for stack in stacks)
        assert "targets=" in told[0]
        weights = {stack: sum(n for name, n in matrices.items() if name.startswith(f"{stack}.")) for stack in stacks}
        kinds = {kind.tower: kind.weights for kind in keeper.targets.kinds if kind.state == "other blocks"}
        assert {stack: kinds[stack] for stack in stacks} == weights
        share = sum(weights.values()) / sum(kind.weights for kind in keeper.targets.kinds)
        assert float(re.search(r"([\d.]+)%", told[0])[1]) / 100 == pytest.approx(share, abs=0.006)
    known = find_targets(on_meta(build))
    towers = sorted({target.tower for target in known})
    outside = known[0].name.split(".")[0]  # of the blocks: one tower by its name
    more = [*known, *(t for t in linear_targets(on_meta(build)) if any(t.name.startswith(f"{s}.") for s in stacks))]
    config = keeplora.KeepLoraConfig(r=2, target_modules="all-linear", towers=towers)
    for modules, options in (("all-linear", {"targets": known}), ("all-linear", {"targets": more}), ((outside,), {})):
        assert not any("no known tower" in message for message in keeper_of(on_meta(build), modules, **options)[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keeplora.KeepLora(on_meta(build), config)
    assert not any("no known tower" in str(w.message) for w in caught)


def test_stacks_that_stay_as_they_are_by_design_are_not_said():
    """A Q-Former; the rest are the members below, with their vision towers, and CoCa."""
    keeper, told = keeper_of(on_meta(blip2))
    assert "qformer.encoder.layer" in {kind.tower for kind in keeper.targets.kinds if kind.state == "other blocks"}
    assert told == []


def test_the_main_blocks_hold_most_weights_not_most_layers():
    """Phi-4's audio encoder has more linear layers than its language model, smaller ones."""
    text = {k: v for k, v in LANGUAGE.items() if k != "hidden_size"}
    config = tf.Phi4MultimodalConfig(
        **text, hidden_size=64,
        vision_config={k: v for k, v in IMAGES.items() if k not in ("image_size",)} | {"image_size": 8},
        audio_config={"hidden_size": 16, "intermediate_size": 24, "num_blocks": 2, "num_attention_heads": 2,
                      "ext_pw_out_channel": 16, "nemo_conv_channels": 16, "depthwise_separable_out_channel": 16},
    )  # fmt: skip
    targets = find_targets(on_meta(lambda: tf.Phi4MultimodalForCausalLM(config)))
    assert {t.name.rpartition(".")[2] for t in targets} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert all(t.name.startswith("model.layers.") for t in targets)


@pytest.mark.parametrize("name", MEMBERS)
def test_shares_add_up_and_weights_are_counted_once(name):
    model, _ = start(name)
    keeper, told = keeper_of(copy.deepcopy(model))
    assert told == []
    kinds = keeper.targets.kinds
    for tower in {kind.tower for kind in kinds}:
        assert sum(kind.share for kind in kinds if kind.tower == tower) == pytest.approx(1)
    adapted = sum(kind.weights for kind in kinds if kind.state == "adapted")
    assert adapted == sum(slot.weight.numel() for slot in keeper.slots)


def test_the_table_of_a_vision_language_model_names_the_other_tower():
    model, _ = start("llava")
    keeper, _ = keeper_of(copy.deepcopy(model), ("attn",))
    lines = str(keeper.targets).splitlines()
    assert lines[0].startswith("8 targets, ")
    assert any(line.startswith("model.vision_tower") and line.endswith("other blocks") for line in lines)
    assert sum(line.endswith("not chosen") for line in lines) == 3
    assert repr(keeper.targets) == str(keeper.targets)


def test_the_tables_rows_of_open_clip():
    keeper, told = keeper_of(open_clip.create_model("coca_ViT-B-32", device="meta"), ("attn",))
    assert told == []
    rows = {(kind.tower, kind.kind): kind for kind in keeper.targets.kinds}
    assert rows["vision", "attn.q_proj"].layers == 12
    assert rows["vision", "attn.q_proj"].weights == 12 * 768 * 768
    assert rows["vision", "mlp.c_fc"].state == "not chosen"
    assert rows["text_decoder.cross_attn", ""].state == "other blocks"


def test_a_list_like_any_other():
    model, _ = start("llama")
    targets = keeper_of(copy.deepcopy(model))[0].targets
    assert isinstance(targets, Targets)
    assert targets == find_targets(model)
    assert targets[1:3] == find_targets(model)[1:3]
    assert [t.name for t in targets] == [t.name for t in copy.deepcopy(targets)]
    assert copy.deepcopy(targets).kinds == targets.kinds
