"""Where the pictures come from: two emoji sets (npm), Debian's open clip art, fonts; on white, 64 pixels."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 64
FINE = 3 * SIDE
"""What is drawn is drawn at this size, and made smaller at the end."""


@dataclass(frozen=True)
class Emoji:
    """One emoji of one vendor."""

    path: Path
    key: str
    """Its code points: the same for both vendors."""
    words: str
    kind: str


def share(key: str, of: str) -> float:
    """A number in [0, 1) that a key alone decides."""
    return int.from_bytes(hashlib.sha256(f"{of}:{key}".encode()).digest()[:4]) / 2**32


@cache
def emoji(root: Path, vendor: str) -> tuple[Emoji, ...]:
    """All emoji of "google" or "twitter" from the unpacked npm package `emoji-datasource-{vendor}`."""
    folder = root / vendor / "package"
    listed = json.loads((folder / "emoji.json").read_text(encoding="utf8"))
    return tuple(
        Emoji(
            folder / "img" / vendor / "64" / entry["image"],
            entry["unified"],
            entry["short_name"].replace("_", " ").replace("-", " "),
            entry["subcategory"],
        )
        for entry in listed
        if entry[f"has_img_{vendor}"]
    )


def held(key: str) -> bool:
    """Whether an emoji or a drawing is for the tasks; the others are for fitting the map between texts and images."""
    return share(key, "map") < 0.85


def part_of(key: str) -> str:
    """The split of whatever may be in one split only."""
    at = share(key, "split")
    return "train" if at < 0.5 else "validation" if at < 0.62 else "test"


@cache
def transparent(path: Path) -> Image.Image:
    """A picture with its alpha, trimmed to a square around it."""
    image = Image.open(path).convert("RGBA")
    box = image.getchannel("A").getbbox()
    image = image.crop(box) if box else image
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def on_white(image: Image.Image, size: int = SIDE, fill: float = 0.9) -> Image.Image:
    """A transparent picture on a white square, of which it takes a part."""
    inner = round(size * fill)
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(image.resize((inner, inner), Image.Resampling.LANCZOS), ((size - inner) // 2,) * 2)
    return canvas.convert("RGB")


def colours(rng: np.random.Generator, apart: float = 120.0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two colours that can be told apart."""
    while True:
        one, two = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
        if abs(float((one - two) @ (0.3, 0.59, 0.11))) > apart:
            return tuple(map(int, one)), tuple(map(int, two))


def glyph(character: str, font: Path, front: tuple[int, ...], back: tuple[int, ...], turn: float) -> Image.Image:
    """One character in the middle, as large as fits."""
    canvas = Image.new("RGB", (FINE, FINE), back)
    face = ImageFont.truetype(str(font), 120)
    left, top, right, bottom = face.getbbox(character)
    size = 120 * 0.62 * FINE / max(right - left, bottom - top)
    face = ImageFont.truetype(str(font), size)
    ImageDraw.Draw(canvas).text((FINE / 2, FINE / 2), character, front, face, anchor="mm")
    return canvas.rotate(turn, Image.Resampling.BICUBIC, fillcolor=back).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


FIT_FONTS = ("DejaVuSerif", "Hack", "Quicksand")
"""For fitting the map."""
TASK_FONTS = {
    "train": (
        "AnonymousPro", "Cabin", "CharisSIL", "Comfortaa", "CourierPrime", "EBGaramond12", "FiraCode", "Lato",
        "LiberationSans", "LiberationSerif", "Sora", "YanoneKaffeesatz",
    ),
    "validation": ("GFSDidot", "LinBiolinum_R", "DancingScript"),
    "test": ("LinLibertine_R", "GFSNeohellenic", "TomsonTalks", "LiberationMono", "lobster"),
}  # fmt: skip
"""A family is in one split only."""


def font_files(root: Path, family: str) -> list[Path]:
    """A family's files without italics, two at most: one thin, one thick where there is one."""
    named = rf"{family}([-_](?!.*(Italic|Oblique)).*)?"
    files = sorted(path for path in root.rglob("*") if path.suffix in (".ttf", ".otf"))
    found = [path for path in files if re.fullmatch(named, path.stem.replace(" ", ""))]
    if not found:
        raise ValueError(f"font_files: family must have a file under {root}, got {family!r} with none.")
    bold = [path for path in found if "Bold" in path.stem]
    return [path for path in found if path not in bold][:1] + bold[:1]


def array(image: Image.Image) -> np.ndarray:
    """uint8 [3, 64, 64]."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
