"""Vision-language models of real classes with random weights, saved with their processors; and questions on colours."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from keeplora.tasks.own import DataSettings, ModelSource, OwnTasks, TaskSource

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30), "white": (240, 240, 240)}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] }}{% else %}<|vision_start|><|{{ c['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LANGUAGE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def tokenizer(specials: list[str], **named: str) -> tf.PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the words of the tests."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    words = (
        [f" {word}" for word in COLOURS] * 9 + list(COLOURS) * 9 + ["USER: What colour? ASSISTANT: user assistant"] * 9
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(words, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, **named)


def llava(folder: Path, *, template: str | None = None, context: int = 128) -> Path:
    """LLaVA on 8 × 8 pixels: four tokens an image."""
    text = tokenizer(["<pad>", "<s>", "</s>", "<image>"], pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    images = tf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = tf.LlavaProcessor(
        images, text, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    )  # fmt: skip
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = tf.LlavaConfig(
        vision_config=vision, vision_feature_layer=-1, image_token_id=text.convert_tokens_to_ids("<image>"),
        text_config=tf.LlamaConfig(
            **{**LANGUAGE, "max_position_embeddings": context}, vocab_size=len(text), pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        ),
    )  # fmt: skip
    return _saved(tf.LlavaForConditionalGeneration, config, processor, folder)


def qwen(folder: Path) -> Path:
    """Qwen2-VL on patches of 4 × 4 pixels: images of any size, videos, and a chat template."""
    specials = ["<pad>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>"]
    text = tokenizer([*specials, "<|vision_end|>"], pad_token="<pad>", eos_token="<|im_end|>")
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    images = tf.Qwen2VLImageProcessor(min_pixels=64, max_pixels=1024, **sizes)
    videos = tf.Qwen2VLVideoProcessor(min_pixels=64, max_pixels=1024, **sizes)
    processor = tf.Qwen2VLProcessor(images, text, videos, chat_template=CHATML)
    named = dict(zip(("image", "video", "vision_start", "vision_end"), range(3, 7), strict=True))
    config = tf.Qwen2VLConfig(
        text_config={
            **LANGUAGE, "vocab_size": len(text), "pad_token_id": 0, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        **{f"{name}_token_id": token for name, token in named.items()},
    )  # fmt: skip
    return _saved(tf.Qwen2VLForConditionalGeneration, config, processor, folder)


def _saved(kind: type, config: object, processor: tf.ProcessorMixin, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, 0.15)  # a trained model's layers do something
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(path: Path, colour: str, *, seed: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)).save(path)
    return path


def asked(image: str, answer: str, question: str = "What colour?") -> dict[str, object]:
    said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": image, "image": image, "conversations": said}


def colours(folder: Path, name: str, classes: tuple[str, ...], count: int = 24) -> TaskSource:
    """A task of images of some colours and the question which."""
    samples = []
    for number in range(count):
        colour = classes[number % len(classes)]
        picture(folder / name / f"{number}.png", colour, seed=number)
        samples.append(asked(f"{name}/{number}.png", colour))
    (folder / f"{name}.json").write_text(json.dumps(samples))
    return TaskSource(name, json=f"{name}.json")


def own(folder: Path, model: Path, *tasks: TaskSource, witness: TaskSource | None = None, **data: object) -> OwnTasks:
    settings = DataSettings(**{"max_new_tokens": 4, "cache": "cache", "test_fraction": 0.34, **data})  # type: ignore[arg-type]
    return OwnTasks(ModelSource(transformers=str(model)), tasks, settings, witness, base=str(folder))
