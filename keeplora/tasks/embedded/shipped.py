"""Read the shipped glyphs and draw the tasks' images from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keeplora.tasks.classification import Split, Task

from .render import COLOURS, Look, draw, named_colours, separated
from .tokenizer import Tokenizer

PARTS = ("train", "validation", "test")


def _describe(directory: Path) -> dict[str, Any]:
    described: dict[str, Any] = json.loads((directory / "tasks.json").read_text(encoding="utf8"))
    return described


def read_names(directory: Path) -> tuple[str, ...]:
    """Names of the shipped tasks in order; the witness is last."""
    return tuple(_describe(directory)["order"])


def read_task(directory: Path, name: str, tokenizer: Tokenizer) -> Task:
    """One task, its images drawn from the stored glyphs (see `render_split`)."""
    entry = _describe(directory)["tasks"][name]
    prompts = tuple(entry["prompt"].format(c) for c in entry["classes"])
    splits = {}
    with np.load(directory / f"{name}.npz") as stored:
        for number, part in enumerate(PARTS):
            glyphs = stored[f"{part}_glyphs"]
            chosen, labels = stored[f"{part}_index"].astype(np.int64), stored[f"{part}_label"].astype(np.int64)
            splits[part] = render_split(glyphs, chosen, labels, entry, seed=[int(entry["seed"]), number])
    return Task(name, tuple(entry["classes"]), prompts, tokenizer(prompts), **splits)


def render_split(
    glyphs: np.ndarray[Any, np.dtype[np.uint8]],
    chosen: np.ndarray[Any, np.dtype[np.int64]],
    labels: np.ndarray[Any, np.dtype[np.int64]],
    entry: dict[str, Any],
    seed: list[int],
) -> Split:
    """Draw image i from glyph `chosen[i]` as the task's entry says.

    `look` gives the arguments of `Look`; `turn` turns the glyph by that many degrees times the label; `paint` colours
    it with the named colour of the label.
    """
    rng = np.random.default_rng(seed)
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["look"].items()}
    look = Look(**settings)
    turn = (labels * entry["turn"]).astype(np.float32) if "turn" in entry else None
    front = back = None
    if entry.get("paint"):
        palette = np.array([COLOURS.index(c) for c in entry["classes"]], dtype=np.int64)
        named = named_colours(palette[labels], rng)
        other = separated(named, look.contrast, rng)
        front, back = (named, other) if entry["paint"] == "front" else (other, named)
    return Split(draw(glyphs[chosen], look, rng, turn=turn, front=front, back=back), torch.from_numpy(labels))
