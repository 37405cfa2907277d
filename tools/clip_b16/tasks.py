"""What the tasks are: for each its classes, and pictures by class and split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from tools.clip_b16.pictures import (
    FINE,
    SIDE,
    TASK_FONTS,
    array,
    colours,
    emoji,
    font_files,
    glyph,
    held,
    on_white,
    part_of,
    share,
    transparent,
)  # fmt: skip

SIZES = {"train": 320, "validation": 72, "test": 104}
"""Pictures of a task at most; in 26 classes, four of each to test."""
Rng = np.random.Generator
Made = Iterator[tuple[str, int, Image.Image]]
"""Split, class and picture, one after the other."""


@dataclass(frozen=True)
class Sources:
    """Folders of the unpacked packages."""

    emoji: Path
    clipart: Path
    fonts: Path


@dataclass(frozen=True)
class Recipe:
    """A task: what its classes are called, and how its pictures are made."""

    classes: tuple[str, ...]
    prompt: str
    make: Callable[[Sources, Rng], Made]


# ---------------------------------------------------------------------- emoji

NOTO = {
    "a mammal": ("animal-mammal",), "a bird": ("animal-bird",), "a sea creature": ("animal-marine",),
    "an insect": ("animal-bug",), "a plant": ("plant-other", "plant-flower"),
    "a fruit or vegetable": ("food-fruit", "food-vegetable"), "a cooked dish": ("food-prepared", "food-asian"),
    "a dessert": ("food-sweet",), "a drink": ("drink", "dishware"),
}  # fmt: skip
TWEMOJI = {
    "a face": ("face-smiling", "face-affection", "face-neutral-skeptical", "face-concerned"),
    "a hand": ("hand-fingers-open", "hand-fingers-closed", "hand-fingers-partial", "hand-single-finger", "hands"),
    "clothing": ("clothing",), "a tool": ("tool",), "an office supply": ("office", "writing", "book-paper"),
    "a musical instrument": ("musical-instrument", "music"), "sport": ("sport",), "a vehicle": ("transport-ground",),
    "a building": ("place-building", "place-religious"), "the sky": ("sky & weather",), "a clock": ("time",),
    "a household object": ("household", "light & video"), "an arrow": ("arrow",),
}  # fmt: skip


def kinds(vendor: str, of: dict[str, tuple[str, ...]]) -> Callable[[Sources, Rng], Made]:
    """Emoji of several kinds; each emoji is in one split."""

    def make(sources: Sources, rng: Rng) -> Made:
        for label, subcategories in enumerate(of.values()):
            for one in emoji(sources.emoji, vendor):
                if one.kind in subcategories and held(one.key):
                    part = part_of(one.key)
                    for copy in range(2 if part == "train" else 1):
                        turned = transparent(one.path).rotate(
                            copy * float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC
                        )
                        yield part, label, on_white(turned)

    return make


# ---------------------------------------------------------------------- clip art

CLIPART = {
    "a mammal": ("animals/mammals",), "a bird": ("animals/birds",), "an insect": ("animals/bugs",),
    "a flower": ("plants/flowers", "plants"), "a fruit": ("food/fruit",), "a dessert": ("food/desserts",),
    "a drink": ("food/beverages",), "a house": ("buildings/homes", "buildings"), "a weapon": ("tools/weapons",),
    "a musical instrument": ("recreation/music",), "a vehicle": ("transportation/vehicles",),
    "a boat": ("transportation/boating",), "computer hardware": ("computer/hardware",),
    "weather": ("signs_and_symbols/weather",),
    "a toy": ("recreation/toys",), "a flag": ("signs_and_symbols/flags/europe", "signs_and_symbols/flags/asia"),
}  # fmt: skip


def clipart(sources: Sources, folder: str) -> list[Path]:
    """Pictures right in a folder that are not too small."""
    return sorted((sources.clipart / folder).glob("*.png"))


def drawings(sources: Sources) -> Iterator[tuple[str, int, Path]]:
    """Split, class and file of the clip art. Numbered drawings of one name stay together, copies are left out."""
    seen: set[bytes] = set()
    for label, folders in enumerate(CLIPART.values()):
        paths = [path for folder in folders for path in clipart(sources, folder)]
        for path in sorted(paths, key=lambda p: share(p.name, "order"))[:30]:
            pixels = array(on_white(transparent(path))).tobytes()
            if pixels not in seen:
                yield part_of(path.stem.rstrip("_0123456789")), label, path
            seen.add(pixels)


def drawn_kinds(sources: Sources, rng: Rng) -> Made:
    """Clip art by its folder."""
    for part, label, path in drawings(sources):
        yield part, label, on_white(transparent(path))


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CARD_STYLES = {"train": ("simple", "bordered"), "test": ("ornamental", "white")}
RANKS = {
    **{f"the number {number}": str(i) for i, number in enumerate(NUMBERS) if i > 1}, "the number ten": "10",
    "the letter J": "j", "the letter Q": "q", "the letter K": "k", "the letter A": "a",
}  # fmt: skip


def cards(sources: Sources, rng: Rng) -> Made:
    """Playing cards by rank. Test decks are never trained; of the others the spades are for validation."""
    ranks = list(RANKS.values())
    for part, decks in CARD_STYLES.items():
        for deck in decks:
            for path in clipart(sources, f"recreation/games/cards/{deck}"):
                _, suit, *rank = path.stem.split("_")
                if rank and rank[0] in ranks:
                    own = "validation" if part == "train" and suit == "s" else part
                    for copy in range(3 if own == "train" else 1):
                        tilted = transparent(path).rotate(copy * float(rng.uniform(-10, 10)), Image.Resampling.BICUBIC)
                        yield own, ranks.index(rank[0]), on_white(tilted, fill=0.98)


def manipulated(sources: Sources, rng: Rng) -> Made:
    """Clip art with one of ten effects; a picture is in one split."""
    pools: dict[str, list[Path]] = {part: [] for part in SIZES}
    for part, _, path in drawings(sources):
        pools[part].append(path)
    for part, size in SIZES.items():
        for i in range(size):
            label = i % len(EFFECTS)
            picture = on_white(transparent(pools[part][int(rng.integers(len(pools[part])))]), FINE)
            yield part, label, list(EFFECTS.values())[label](picture, rng)


def _scatter(image: Image.Image, rng: Rng) -> Image.Image:
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)).astype(np.float32)
    return Image.fromarray((small + rng.normal(0, 70, small.shape)).clip(0, 255).astype(np.uint8))


def _halftone(image: Image.Image, rng: Rng) -> Image.Image:
    grey = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX)) / 255
    canvas = Image.new("L", (FINE, FINE), 255)
    pen = ImageDraw.Draw(canvas)
    for (y, x), value in np.ndenumerate(grey):
        r = 7.5 * math.sqrt(1 - value)
        pen.ellipse((12 * x + 6 - r, 12 * y + 6 - r, 12 * x + 6 + r, 12 * y + 6 + r), 0)
    return canvas


def _stretched(image: Image.Image, rng: Rng) -> Image.Image:
    wide = image.resize((FINE, FINE // 3), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (FINE, FINE), "white")
    canvas.paste(wide, (0, FINE // 3))
    return canvas


def _blurred(image: Image.Image, rng: Rng) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(9, 14))))


def _pixelated(image: Image.Image, rng: Rng) -> Image.Image:
    return image.resize((14, 14), Image.Resampling.BOX).resize((FINE, FINE), Image.Resampling.NEAREST)


def _outlined(image: Image.Image, rng: Rng) -> Image.Image:
    edges = image.convert("L").filter(ImageFilter.FIND_EDGES).point(lambda v: min(255, 4 * v))
    return ImageOps.invert(edges.filter(ImageFilter.MaxFilter(3)))


EFFECTS: dict[str, Callable[[Image.Image, Rng], Image.Image]] = {
    "an unchanged picture": lambda image, rng: image,
    "a blurred picture": _blurred,
    "a pixelated picture": _pixelated,
    "a grey picture": lambda image, rng: image.convert("L"),
    "a photographic negative": lambda image, rng: ImageOps.invert(image),
    "an outline drawing": _outlined,
    "a silhouette": lambda image, rng: image.convert("L").point(lambda v: 0 if v < 245 else 255),
    "a noisy picture": _scatter,
    "a picture of dots": _halftone,
    "a squeezed picture": _stretched,
}

# ---------------------------------------------------------------------- glyphs

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letters(sources: Sources, rng: Rng) -> Made:
    """Capital letters; a font family is in one split."""
    for part, families in TASK_FONTS.items():
        files = [path for family in families for path in font_files(sources.fonts, family)]
        for i in range(SIZES[part]):
            label = i % 26
            front, back = colours(rng)
            font = files[int(rng.integers(len(files)))]
            yield part, label, glyph(LETTERS[label], font, front, back, float(rng.uniform(-30, 30)))


def digits(sources: Sources, rng: Rng) -> Made:
    """scikit-learn's scanned digits; the last 797 of them are for the tests."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for part, rows in {"train": range(800), "validation": range(800, 1000), "test": range(1000, 1797)}.items():
        for row in rng.permutation(np.array(rows))[: SIZES[part]]:
            grey = (255 - images[row].reshape(8, 8) * 255 / 16).clip(0, 255).astype(np.uint8)
            canvas = Image.new("L", (FINE, FINE), 255)
            canvas.paste(Image.fromarray(grey).resize((144, 144), Image.Resampling.BICUBIC), (24, 24))
            yield part, int(labels[row]), canvas


# ---------------------------------------------------------------------- textures


def _cells(rng: Rng) -> tuple[np.ndarray, np.ndarray, float]:
    """Coordinates in periods, turned by a random angle, and the angle's pattern width."""
    width, angle = float(rng.uniform(26, 56)), float(rng.uniform(0, math.pi))
    y, x = np.mgrid[:FINE, :FINE] + rng.uniform(0, 99, 2).reshape(2, 1, 1)
    u, v = math.cos(angle) * x + math.sin(angle) * y, -math.sin(angle) * x + math.cos(angle) * y
    return u / width, v / width, width


def _frac(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)


def _stripes(rng: Rng) -> np.ndarray:
    u, _, _ = _cells(rng)
    return _frac(u) < 0.5


def _dots(rng: Rng) -> np.ndarray:
    u, v, _ = _cells(rng)
    return np.hypot(_frac(u) - 0.5, _frac(v) - 0.5) < rng.uniform(0.22, 0.36)


def _checks(rng: Rng) -> np.ndarray:
    u, v, _ = _cells(rng)
    return (np.floor(u) + np.floor(v)) % 2 == 0


def _zigzag(rng: Rng) -> np.ndarray:
    u, v, _ = _cells(rng)
    return _frac(u + abs(_frac(v) - 0.5) * 1.2) < 0.5


def _waves(rng: Rng) -> np.ndarray:
    u, v, _ = _cells(rng)
    return _frac(u + 0.25 * np.sin(2 * np.pi * v / 1.6)) < 0.5


def _bricks(rng: Rng) -> np.ndarray:
    u, v, _ = _cells(rng)
    row = np.floor(u)
    return (_frac(u) > 0.14) & (_frac(v / 2 + row / 2) > 0.07)


def _grid(rng: Rng) -> np.ndarray:
    u, v, _ = _cells(rng)
    return (_frac(u) < 0.14) | (_frac(v) < 0.14)


def _plaid(rng: Rng) -> np.ndarray:
    u, v, _ = _cells(rng)
    return (0.5 * (_frac(u) < 0.5) + 0.5 * (_frac(v) < 0.5)).astype(float)


def _honeycomb(rng: Rng) -> np.ndarray:
    u, v, _ = _cells(rng)
    a, b = u * 1.2, v * 1.2 / math.sqrt(3)
    near = []
    for shift in (0.0, 0.5):
        da, db = _frac(a + shift) - 0.5, (_frac(b + shift) - 0.5) * math.sqrt(3)
        near.append(np.maximum(abs(da), abs(da) / 2 + abs(db) * math.sqrt(3) / 2))
    return np.minimum(*near) < 0.43


def _rings(rng: Rng) -> np.ndarray:
    y, x = np.mgrid[:FINE, :FINE] - rng.uniform(60, 132, 2).reshape(2, 1, 1)
    return _frac(np.hypot(x, y) / rng.uniform(22, 44)) < 0.5


def _spiral(rng: Rng) -> np.ndarray:
    y, x = np.mgrid[:FINE, :FINE] - rng.uniform(70, 122, 2).reshape(2, 1, 1)
    turn = float(rng.choice([-1.0, 1.0]))
    return _frac(np.hypot(x, y) / rng.uniform(26, 46) + turn * np.arctan2(y, x) / (2 * np.pi)) < 0.5


def _rays(rng: Rng) -> np.ndarray:
    y, x = np.mgrid[:FINE, :FINE] - rng.uniform(60, 132, 2).reshape(2, 1, 1)
    return _frac(np.arctan2(y, x) / (2 * np.pi) * int(rng.integers(8, 15)) + rng.uniform()) < 0.5


def _static(rng: Rng) -> np.ndarray:
    return np.kron(rng.random((48, 48)) < 0.5, np.ones((4, 4), bool))


TEXTURES: dict[str, Callable[[Rng], np.ndarray]] = {
    "stripes": _stripes, "polka dots": _dots, "a chessboard": _checks, "a zigzag": _zigzag, "waves": _waves,
    "a brick wall": _bricks, "a grid": _grid, "plaid cloth": _plaid, "a honeycomb": _honeycomb, "rings": _rings,
    "a spiral": _spiral, "sun rays": _rays, "television static": _static,
}  # fmt: skip


def textures(sources: Sources, rng: Rng) -> Made:
    """Patterns in two colours, of random width, angle and place."""
    for part, size in SIZES.items():
        for i in range(size):
            label = i % len(TEXTURES)
            pattern = list(TEXTURES.values())[label](rng).astype(float)[..., None]
            front, back = colours(rng)
            yield part, label, Image.fromarray((pattern * front + (1 - pattern) * back).astype(np.uint8))


TASKS: dict[str, Recipe] = {
    "letters": Recipe(tuple(LETTERS), "the letter {}", letters),
    "noto": Recipe(tuple(NOTO), "{}", kinds("google", NOTO)),
    "textures": Recipe(tuple(TEXTURES), "a pattern of {}", textures),
    "twemoji": Recipe(tuple(TWEMOJI), "{}", kinds("twitter", TWEMOJI)),
    "digits": Recipe(NUMBERS, "the number {}", digits),
    "effects": Recipe(tuple(EFFECTS), "{}", manipulated),
    "cards": Recipe(tuple(RANKS), "{}", cards),
    "clipart": Recipe(tuple(CLIPART), "{}", drawn_kinds),
}
"""In learning order, signs and things in turn; the last one is the witness."""
