"""Small image folders and a small open_clip model, written to a disk as a user has them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200)}


def write_model(folder: Path) -> Path:
    """A folder that `open_clip.create_model("local-dir:…")` reads: random weights, real preprocessing."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    text = json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}})
    (folder / "open_clip_config.json").write_text(text)
    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        CONFIG["embed_dim"],
        open_clip.CLIPVisionCfg(**CONFIG["vision_cfg"]),
        open_clip.CLIPTextCfg(**CONFIG["text_cfg"]),
    )
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def picture(name: str, seed: int, size=(40, 48)) -> Image.Image:
    """A noisy picture of a colour, one of `COLOURS`."""
    noise = np.random.default_rng([seed, *name.encode()]).normal(0, 25, (*size, 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))


def write_classes(folder: Path, images: int = 10, names=tuple(COLOURS), suffix: str = ".png", prefix: str = "") -> Path:
    """`folder/prefix + class/number`, a class for each colour."""
    for name in names:
        (folder / f"{prefix}{name}").mkdir(parents=True)
        for number in range(images):
            picture(name, number).save(folder / f"{prefix}{name}" / f"{number:02}{suffix}")
    return folder


def write_clip(folder: Path) -> Path:
    """A folder that transformers' `AutoModel` and `AutoProcessor` read: a CLIP with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "photo", "of", ".", "dark", "word", *COLOURS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>"
    )
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**tower, **text, "pad_token_id": 0},
        vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=16,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(image_processor=images, tokenizer=fast).save_pretrained(folder)
    return folder
