"""Write the tasks' pictures into keeplora/tasks/clip_b16/data: `python -m tools.clip_b16.build --help`."""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tools.clip_b16.pictures import array
from tools.clip_b16.tasks import SIZES, TASKS, Recipe, Sources

DATA = Path(__file__).parents[2] / "keeplora" / "tasks" / "clip_b16" / "data"
COLOURS = 32
"""Of a picture: what a palette of its own costs is a third of the bytes."""


def paletted(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """A picture as numbers of colours uint8 [64, 64] and its colours uint8 [32, 3]."""
    pixels = Image.fromarray(array(image).transpose(1, 2, 0))
    few = pixels.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette = np.zeros((COLOURS, 3), np.uint8)
    colours = np.array(few.getpalette(), np.uint8).reshape(-1, 3)[:COLOURS]
    palette[: len(colours)] = colours
    return np.asarray(few), palette


def build(name: str, recipe: Recipe, sources: Sources, out: Path) -> None:
    """One task's file: at most SIZES pictures of every split, classes as evenly as they come."""
    made: dict[str, list[tuple[int, Image.Image]]] = {part: [] for part in SIZES}
    for part, label, picture in recipe.make(sources, np.random.default_rng(zlib.crc32(name.encode()))):
        made[part].append((label, picture))
    arrays: dict[str, np.ndarray] = {}
    for part, size in SIZES.items():
        order = np.random.default_rng(0).permutation(len(made[part]))[:size]
        stored = [paletted(made[part][i][1]) for i in order]
        arrays[f"{part}_index"] = np.stack([index for index, _ in stored])
        arrays[f"{part}_palette"] = np.stack([palette for _, palette in stored])
        arrays[f"{part}_labels"] = np.array([made[part][i][0] for i in order], np.uint8)
    np.savez_compressed(out / f"{name}.npz", **arrays)
    counts = {part: np.bincount(arrays[f"{part}_labels"], minlength=len(recipe.classes)) for part in SIZES}
    sizes = ", ".join(f"{part} {count.sum()} (at least {count.min()} of a class)" for part, count in counts.items())
    print(
        f"{name:<9} {len(recipe.classes)} classes: {sizes}; {(out / f'{name}.npz').stat().st_size >> 10} KiB",
        flush=True,
    )


def folders(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--emoji", type=Path, required=True, help="holds google/package and twitter/package")
    parser.add_argument("--clipart", type=Path, required=True, help="usr/share/openclipart/png of the Debian package")
    parser.add_argument("--fonts", type=Path, required=True, help="the root that the font packages were unpacked into")
    return parser


def main() -> None:
    parser = folders(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--only", nargs="*", default=list(TASKS))
    parsed = parser.parse_args()
    DATA.mkdir(exist_ok=True)
    sources = Sources(parsed.emoji, parsed.clipart, parsed.fonts)
    for name in parsed.only:
        build(name, TASKS[name], sources, DATA)
    described = {name: {"classes": recipe.classes, "prompt": recipe.prompt} for name, recipe in TASKS.items()}
    (DATA / "tasks.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
