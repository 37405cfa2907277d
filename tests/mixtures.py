"""Tiny mixtures of experts of transformers' own classes, with random weights, and a padded text for them."""

import torch
import transformers as tf
from families.members import LANGUAGE, QWEN_VISION, SPECIAL
from torch import nn

SMALL = {**LANGUAGE, "head_dim": 8}


def qwen3_moe(**changes):
    sizes = {"moe_intermediate_size": 8, "num_experts": 8, "num_experts_per_tok": 3, **changes}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**{**SMALL, **sizes}))


def mixtral():
    return tf.MixtralForCausalLM(tf.MixtralConfig(**LANGUAGE, num_local_experts=4))


def llama4():
    """Transposed weights, no routing in the experts' forward."""
    sizes = {"num_local_experts": 4, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**SMALL, **sizes))


def gpt_oss():
    """Transposed weights with biases, gates and values by turns."""
    return tf.GptOssForCausalLM(tf.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))


def qwen3_vl_moe():
    text = {**SMALL, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {**QWEN_VISION, "intermediate_size": 24, "out_hidden_size": 16, "deepstack_visual_indexes": []}
    config = tf.Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "num_position_embeddings": 16}, **SPECIAL)
    return tf.Qwen3VLMoeForConditionalGeneration(config)


MIXTURES = [qwen3_moe, mixtral, llama4, gpt_oss, qwen3_vl_moe]


def built(make, implementation=None, dtype=torch.float32, **changes):
    """Always the same weights, whatever the generators' state."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = make(**changes).eval().to(dtype)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, 0.25)
    if implementation is not None and make is not llama4:  # which has one alone
        model.set_experts_implementation(implementation)
    return model


def experts_of(model, block=0):
    """Path and module of a block's experts."""
    ends = (f".{block}.mlp.experts", f".{block}.feed_forward.experts")
    return next((path, module) for path, module in model.named_modules() if path.endswith(ends))


def text(seed, samples=3, tokens=10, padded=0):
    """Texts with their masks and labels, the last one padded on its right."""
    ids = torch.randint(3, 50, (samples, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        ids[-1, -padded:], mask[-1, -padded:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loss_fn(model, batch):
    return model(**batch).loss


def train(method, data, steps=4):
    optimizer = method.optimizer(lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        loss, penalty = loss_fn(method.model, data[step % len(data)]), method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        method.after_step()
