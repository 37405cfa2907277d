"""Rasterise glyphs: 32 x 32 coverage masks (letters and symbols) and 32 x 32 RGBA pictures (colour emoji)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

SIDE = 32
EXTENT = 30  # the longer side of the glyph's bounding box, in pixels
LEVELS = 15  # masks keep 16 grey levels: nothing visible is lost and they compress twice as well

Pixels = npt.NDArray[np.uint8]


@lru_cache(maxsize=512)
def _face(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


def _fit(picture: Image.Image) -> Image.Image:
    """The picture's inked box, scaled to EXTENT and centred on a square of SIDE."""
    scale = EXTENT / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    scaled = picture.resize(size, Image.Resampling.LANCZOS)
    square = Image.new(picture.mode, (SIDE, SIDE))
    square.paste(scaled, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return square


def mask(text: str, font: Path) -> Pixels | None:
    """Coverage of the text set in a font, [32, 32]; None where nothing is inked."""
    canvas = Image.new("L", (224, 176), 0)
    ImageDraw.Draw(canvas).text((64, 44), text, font=_face(font, 64), fill=255)
    box = canvas.getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < 6:
        return None
    coverage = np.asarray(_fit(canvas.crop(box)), dtype=np.float32)
    return (np.round(coverage / 255 * LEVELS) * (255 // LEVELS)).astype(np.uint8)


def picture(text: str, font: Path) -> Pixels | None:
    """Colour emoji as RGBA, [4, 32, 32]; None where the font draws nothing."""
    canvas = Image.new("RGBA", (320, 200), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((20, 20), text, font=_face(font, 109), embedded_color=True)
    box = canvas.getbbox()
    if box is None or box[2] - box[0] > 180:  # two glyphs: the font has no such ligature
        return None
    return np.asarray(_fit(canvas.crop(box)), dtype=np.uint8).transpose(2, 0, 1).copy()
