"""Models of transformers that read texts, with random weights, and padded batches for them."""

import torch
import transformers as tf
from families.members import LANGUAGE, PAD, VISION
from torch import nn

from keeplora.families import find_targets
from keeplora.lora import linear_targets

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": PAD}
ENCODER = {**SMALL, "intermediate_size": 24, "max_position_embeddings": 40}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
GIT_VISION = {k: v for k, v in VISION.items() if k != "projection_dim"}
STACKS = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": PAD,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
FSMT = {**STACKS, "langs": ["en", "de"], "src_vocab_size": 60, "tgt_vocab_size": 60}
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
    "fsmt": lambda: tf.FSMTModel(tf.FSMTConfig(**FSMT, use_cache=False)),
    "pegasus-x": lambda: tf.PegasusXModel(
        tf.PegasusXConfig(**STACKS, block_size=6, num_global_tokens=3, stagger_local_blocks=True)
    ),
    "led": lambda: tf.LEDModel(tf.LEDConfig(**STACKS, attention_window=4, max_encoder_position_embeddings=40)),
    "bart": lambda: tf.BartModel(tf.BartConfig(**STACKS)),
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


def decoded(samples, tokens, pad):
    """Ids of a decoder, with another padding than its encoder's."""
    mask = torch.ones(samples, tokens, dtype=torch.long)
    mask[0, 5:], mask[2, 2:] = 0, 0
    ids = torch.randint(5, 58, mask.shape, generator=torch.Generator().manual_seed(3)).masked_fill(mask == 0, pad)
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def more_of(name, samples, tokens, pad):
    generator = torch.Generator().manual_seed(2)
    if name == "git":
        return {"pixel_values": torch.randn(samples, 3, 8, 8, generator=generator)}
    if name == "t5":
        return {"decoder_input_ids": torch.randint(5, 58, (samples, 4), generator=generator)}
    return decoded(samples, tokens, pad) if name in ("fsmt", "pegasus-x", "led", "bart") else {}


def first_tokens(model, batch):
    return model(**batch).last_hidden_state[:, :2].square().mean()


def own_targets(name, model):
    targets = linear_targets(model) if model.config.is_encoder_decoder else find_targets(model)
    without = ("_global", "final_char_encoder")  # nothing asks for Longformer's; CANINE's stand behind a convolution
    return [target for target in targets if not any(part in target.name for part in without)]


def families_loss(model, batch):
    return model(**batch).logits if "labels" in batch else model(**batch).logits_per_image
