"""One tiny model of each family, with random weights, and batches of its inputs: padded text, images, videos."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

import keeplora

CONFIG = keeplora.KeepLoraConfig(
    r=2, alpha=2.0, target_modules="all-linear", weight_energy=0.3, feature_energy=0.4, depth_scale=0.5
)
PAD, IMAGE, VIDEO, START, END = 0, 50, 51, 52, 53
LANGUAGE = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "projection_dim": 8,
}  # fmt: skip
TEXT = {k: v for k, v in LANGUAGE.items() if k not in ("num_key_value_heads", "eos_token_id")}
TEXT |= {"projection_dim": 8, "eos_token_id": 59, "max_position_embeddings": 12}
QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
SPECIAL = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
MROPE = {**LANGUAGE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Member:
    """A model of a family: how it is made, what it is fed, and what its blocks' layers are."""

    make: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, torch.Generator], Batch]
    language: bool  # generates text
    kinds: dict[str, int]  # targets by tower, two blocks each


def model_of(name: str) -> nn.Module:
    """Always the same weights, whatever the generators' state."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = MEMBERS[name].make().eval()
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, 0.25)  # a trained model's layers do something
            elif key == "model.image_newline":
                nn.init.normal_(parameter)
    return model


@functools.cache
def start(name: str) -> tuple[nn.Module, list[list[Batch]]]:
    """The model and two tasks of two batches; not to be changed."""
    model = model_of(name)
    return model, [batches(name, model, seed) for seed in (0, 1)]


def fresh(name: str) -> tuple[nn.Module, list[list[Batch]]]:
    """The same, with a model of one's own."""
    model, tasks = start(name)
    return copy.deepcopy(model), tasks


def batches(name: str, model: nn.Module, seed: int, count: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [MEMBERS[name].inputs(model, generator) for _ in range(count)]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    contrastive = {} if "labels" in batch else {"return_loss": True}
    loss: Tensor = model(**batch, **contrastive).loss
    return loss


def train(keeper: keeplora.KeepLora, task: list[Batch], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=3e-2)
    for step in range(steps):
        optimizer.zero_grad()
        loss_fn(keeper.model, task[step % len(task)]).backward()
        optimizer.step()


def learn(keeper: keeplora.KeepLora, task: list[Batch], steps: int = 3) -> keeplora.RetentionCertificate:
    keeper.before_task(task, loss_fn)
    train(keeper, task, steps)
    return keeper.after_task(task)


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> Tensor:
    found = model(**batch)
    logits: Tensor = found.logits if "logits" in found else found.logits_per_image
    return logits


def _text(generator: torch.Generator, media: list[list[int]], *, left: bool = False) -> Batch:
    """Rows of media tokens and 4 to 6 words, padded to one length; labels on the words."""
    rows = []
    for i, inside in enumerate(media):
        words = torch.randint(3, 48, (4 + i % 3,), generator=generator)
        rows.append(torch.cat([torch.tensor([1, *inside], dtype=torch.long), words]))
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    labels = ids.masked_fill((mask == 0) | (ids >= 48), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _pairs(generator: torch.Generator, *, mask: bool, count: int = 4) -> Batch:
    ids = torch.full((count, 9), PAD)
    for i in range(count):
        length = 4 + i
        ids[i, :length] = torch.randint(3, 48, (length,), generator=generator)
        ids[i, length] = 59
    batch = {"input_ids": ids, "pixel_values": _normal(generator, count, 3, 8, 8)}
    return batch | ({"attention_mask": (ids != PAD).long()} if mask else {})


def _naflex(_: nn.Module, generator: torch.Generator) -> Batch:
    """SigLIP2's images: patches of two sizes of image, padded to one number."""
    shapes = torch.tensor([[2, 2], [1, 3], [2, 2], [3, 1]])
    pixels, mask = torch.zeros(4, 4, 48), torch.zeros(4, 4, dtype=torch.long)
    for i, patches in enumerate(shapes.prod(1).tolist()):
        pixels[i, :patches], mask[i, :patches] = _normal(generator, patches, 48), 1
    return _pairs(generator, mask=True) | {
        "pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes
    }  # fmt: skip


def _llava(_: nn.Module, generator: torch.Generator) -> Batch:
    """One, two and no image per row."""
    text = _text(generator, [[IMAGE] * 4, [IMAGE] * 8, []])
    return text | {"pixel_values": _normal(generator, 3, 3, 8, 8)}


def _llava_next(model: Any, generator: torch.Generator) -> Batch:
    """Two images of different shape, cut into tiles."""
    pixels, sizes = _normal(generator, 2, 3, 3, 8, 8), torch.tensor([[8, 16], [6, 16]])
    with torch.no_grad():
        found = model.get_image_features(pixels, sizes, return_dict=True).pooler_output
    text = _text(generator, [[IMAGE] * len(found[0]), [IMAGE] * len(found[1])])
    return text | {"pixel_values": pixels, "image_sizes": sizes}


def _llava_next_video(model: Any, generator: torch.Generator) -> Batch:
    """A video of three frames in one row, none in the other."""
    videos = _normal(generator, 1, 3, 3, 8, 8)
    return _text(generator, [[VIDEO] * 3, []]) | {"pixel_values_videos": videos}


def _video_llava(model: Any, generator: torch.Generator) -> Batch:
    """An image in one row, a video of eight frames in the other."""
    images, videos = _normal(generator, 1, 3, 8, 8), _normal(generator, 1, 8, 3, 8, 8)
    text = _text(generator, [[IMAGE] * 4, [VIDEO] * 40])
    return text | {"pixel_values_images": images, "pixel_values_videos": videos}


def _qwen(_: nn.Module, generator: torch.Generator) -> Batch:
    """Two images in one row, a video of four frames in the other."""
    image, video = [START, *[IMAGE] * 4, END], [START, *[VIDEO] * 8, END]
    text = _text(generator, [[*image, START, IMAGE, END], video], left=True)
    kinds = (text["input_ids"] == IMAGE).int() + 2 * (text["input_ids"] == VIDEO).int()
    return text | {
        "pixel_values": _normal(generator, 16 + 4, 96), "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 2]]),
        "pixel_values_videos": _normal(generator, 32, 96), "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "mm_token_type_ids": kinds,
    }  # fmt: skip


def text_batch(_: nn.Module, generator: torch.Generator) -> Batch:
    return _text(generator, [[], [], []], left=True)


def _llava_config(cls: type, **more: Any) -> Any:
    return cls(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**LANGUAGE), image_token_id=IMAGE,
        vision_feature_layer=-1, **more,
    )  # fmt: skip


TILES = {"image_grid_pinpoints": [[8, 8], [8, 16], [16, 8]]}
TWO = {"vision": 12, "text": 12}
MEMBERS = {
    "clip": Member(
        lambda: tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)),
        lambda _, g: _pairs(g, mask=True), False, TWO,
    ),
    "siglip": Member(
        lambda: tf.SiglipModel(tf.SiglipConfig(text_config=TEXT, vision_config=VISION)),
        lambda _, g: _pairs(g, mask=False), False, TWO,
    ),
    "siglip2": Member(
        lambda: tf.Siglip2Model(tf.Siglip2Config(text_config=TEXT, vision_config={**VISION, "num_patches": 4})),
        _naflex, False, TWO,
    ),
    "llava": Member(
        lambda: tf.LlavaForConditionalGeneration(_llava_config(tf.LlavaConfig)), _llava, True, {"language": 14}
    ),
    "llava-next": Member(
        lambda: tf.LlavaNextForConditionalGeneration(_llava_config(tf.LlavaNextConfig, **TILES)),
        _llava_next, True, {"language": 14},
    ),
    "llava-next-video": Member(
        lambda: tf.LlavaNextVideoForConditionalGeneration(
            _llava_config(tf.LlavaNextVideoConfig, video_token_id=VIDEO, **TILES)
        ),
        _llava_next_video, True, {"language": 14},
    ),
    "video-llava": Member(
        lambda: tf.VideoLlavaForConditionalGeneration(_llava_config(tf.VideoLlavaConfig, video_token_id=VIDEO)),
        _video_llava, True, {"language": 14},
    ),
    "qwen2-vl": Member(
        lambda: tf.Qwen2VLForConditionalGeneration(
            tf.Qwen2VLConfig(text_config=MROPE, vision_config={**QWEN_VISION, "embed_dim": 16}, **SPECIAL)
        ),
        _qwen, True, {"language": 14},
    ),
    "qwen2.5-vl": Member(
        lambda: tf.Qwen2_5_VLForConditionalGeneration(
            tf.Qwen2_5_VLConfig(
                text_config=MROPE, **SPECIAL,
                vision_config={
                    **QWEN_VISION, "out_hidden_size": 16, "intermediate_size": 24, "window_size": 16,
                    "fullatt_block_indexes": [1],
                },
            )
        ),
        _qwen, True, {"language": 14},
    ),
    "llama": Member(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LANGUAGE)), text_batch, True, {"language": 14}),
}  # fmt: skip
