"""Fit the map from MiniLM's texts to CLIP's images: `python -m tools.clip_b16.fit --help` writes data/map.npz.

Pictures that no task has, with a few words each: e is an image's embedding, t its words', both of length 1, μ the mean
of the e. `W = (Σ tᵀt + λ 1)⁻¹ Σ tᵀ(e − μ)`; λ and the temperature are those with which every fifth picture, left out,
finds its own words best among theirs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from keeplora.tasks.classification import Split, normalize
from keeplora.tasks.clip_b16 import ImageTextEncoder, load_image_tower, resized
from keeplora.tasks.clip_b16.model import SIZE
from keeplora.tasks.minilm import embed, load_encoder, load_tokenizer
from tools.clip_b16.build import DATA, folders
from tools.clip_b16.pictures import FIT_FONTS, array, colours, emoji, font_files, glyph, held, on_white, transparent
from tools.clip_b16.tasks import EFFECTS, FINE, LETTERS, NOTO, NUMBERS, TEXTURES, TWEMOJI, Sources

WITHOUT = (
    "country-flag", "subdivision-flag", "skin-tone", "family", "alphanum", "person-sport", "person-activity",
    "person-role",
)  # fmt: skip
"""Kinds of emoji whose names say little about a picture."""
TASK_KINDS = {kind for kinds in (*NOTO.values(), *TWEMOJI.values()) for kind in kinds}
PATTERN_WORDS = (
    "parallel lines", "a spotted fabric", "a board of black and white squares", "a jagged line", "a wavy surface",
    "a wall", "a net", "a checked shirt", "hexagons", "circles around one another", "a coil", "a sunburst",
    "random grains",
)  # fmt: skip
EFFECT_WORDS = (
    "a clear image of {}", "a blurry image of {}", "an image of {} made of large squares",
    "a black and white image of {}",
    "an image of {} in inverted colours", "a line drawing of {}", "the black shape of {}", "a grainy image of {}",
    "an image of {} printed in dots", "a flattened image of {}",
)  # fmt: skip
TIMES = {"texture": 5, "effect": 16}
"""Pictures of each of them."""


def pairs(sources: Sources) -> Iterator[tuple[Image.Image, str]]:
    """Pictures that are in no task, and their words."""
    rng = np.random.default_rng(5)
    own = [
        one
        for one in emoji(sources.emoji, "google")
        if one.kind not in WITHOUT and (one.kind not in TASK_KINDS or not held(one.key))
    ]
    for one in own:
        yield on_white(transparent(one.path)), one.words
    named = {c: f"the letter {c}" for c in LETTERS} | {str(i): f"the number {n}" for i, n in enumerate(NUMBERS)}
    for family in FIT_FONTS:
        for character, words in named.items():
            yield glyph(character, font_files(sources.fonts, family)[0], *colours(rng), 0.0), words
    for make, words in zip(TEXTURES.values(), PATTERN_WORDS, strict=True):
        for _ in range(TIMES["texture"]):
            pattern, (front, back) = make(rng).astype(float)[..., None], colours(rng)
            yield Image.fromarray((pattern * front + (1 - pattern) * back).astype(np.uint8)), words
    for change, words in zip(EFFECTS.values(), EFFECT_WORDS, strict=True):
        for _ in range(TIMES["effect"]):
            one = own[int(rng.integers(len(own)))]
            yield change(on_white(transparent(one.path), FINE), rng), words.format(one.words)


@torch.no_grad()
def embedded(sources: Sources) -> tuple[Tensor, Tensor]:
    """Embeddings of length 1 of all pairs: images [n, 512] and texts [n, 384]."""
    found = list(pairs(sources))
    pictures = torch.from_numpy(np.stack([array(picture) for picture, _ in found]))
    images = resized(Split(pictures, torch.zeros(len(found), dtype=torch.int64)), SIZE).images
    model = ImageTextEncoder(load_image_tower(), load_encoder(), torch.eye(384, 512), torch.zeros(512), 0.0)
    tokenizer = load_tokenizer()
    e, t = [], []
    for i in range(0, len(found), 32):
        e.append(model.encode_image(normalize(images[i : i + 32]), normalize=True))
        tokens = tokenizer([words for _, words in found[i : i + 32]], padding=True, return_tensors="pt")["input_ids"]
        t.append(embed(model.text, torch.as_tensor(tokens)))
    return torch.cat(e), torch.cat(t)


def ridge(t: Tensor, e: Tensor, weight: float) -> Tensor:
    """W [384, 512] of centred images e."""
    return torch.linalg.solve(t.T @ t + weight * torch.eye(t.shape[1]), t.T @ e)


def main() -> None:
    parsed = folders(argparse.ArgumentParser(description=__doc__)).parse_args()
    e, t = embedded(Sources(parsed.emoji, parsed.clipart, parsed.fonts))
    out = torch.arange(len(e)) % 5 == 0
    mean = e[~out].mean(0)
    choices = {}
    for weight in (0.3, 1.0, 3.0):
        texts = F.normalize(t[out] @ ridge(t[~out], e[~out] - mean, weight), dim=-1)
        cosines = F.normalize(e[out] - mean, dim=-1) @ texts.T
        for scale in (5.0, 10.0, 15.0, 20.0, 30.0):
            choices[weight, scale] = float(F.cross_entropy(scale * cosines, torch.arange(len(cosines))))
    (weight, scale), loss = min(choices.items(), key=lambda item: item[1])
    mean = e.mean(0)
    projection = ridge(t, e - mean, weight)
    np.savez_compressed(
        DATA / "map.npz", projection=projection.numpy().astype(np.float16), mean=mean.numpy(),
        logit_scale=np.float32(np.log(scale)),
    )  # fmt: skip
    chance = np.log(int(out.sum()))
    print(f"{len(e)} pairs, λ {weight}, temperature 1/{scale:.0f}, cross-entropy {loss:.3f} of {chance:.3f}")


if __name__ == "__main__":
    main()
