"""Turn clean glyphs into 32 x 32 colour images: turned, scaled, shifted, painted, blurred and noisy, from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32
NOISE_BANK = 1 << 19  # normals drawn once per call; each image reads a window at its own offset

# Named colours as ranges of hue (degrees), saturation and value.
PALETTE: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-8, 8), (0.8, 1.0), (0.7, 1.0)),
    "orange": ((24, 36), (0.85, 1.0), (0.9, 1.0)),
    "yellow": ((50, 60), (0.75, 1.0), (0.9, 1.0)),
    "green": ((95, 145), (0.6, 1.0), (0.4, 0.85)),
    "blue": ((212, 240), (0.7, 1.0), (0.6, 1.0)),
    "purple": ((265, 285), (0.6, 1.0), (0.45, 0.8)),
    "pink": ((320, 345), (0.3, 0.55), (0.95, 1.0)),
    "brown": ((18, 30), (0.6, 0.85), (0.3, 0.5)),
    "black": ((0, 360), (0.0, 0.2), (0.0, 0.12)),
    "white": ((0, 360), (0.0, 0.06), (0.94, 1.0)),
    "grey": ((0, 360), (0.0, 0.08), (0.4, 0.65)),
}
COLOURS = tuple(PALETTE)


@dataclass(frozen=True)
class Look:
    """How images of a task are drawn.

    `lean`: turn of every image in degrees, counter-clockwise; `tilt`: largest further turn either way; `extent`: range
    of the glyph's longer side as a share of the image; `shift`: largest shift in pixels; `noise`: range of the
    standard deviation in grey levels, of which a share `noisy` of the images gets any; `blur`: share of images
    smoothed by a 3 x 3 binomial filter; `plain`: share of images in black on white or white on black; `contrast`:
    least distance between the colours' grey levels; `ghost`: strength of a second, unrelated glyph of the same set
    drawn faintly behind; `mirror`: left and right swapped.
    """

    lean: float = 0.0
    tilt: float = 10.0
    extent: tuple[float, float] = (0.6, 0.9)
    shift: float = 2.0
    noise: tuple[float, float] = (0.0, 0.0)
    noisy: float = 1.0
    blur: float = 0.0
    plain: float = 0.4
    contrast: float = 80.0
    ghost: float = 0.0
    mirror: bool = False


def named_colours(indices: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """One colour per index into `COLOURS`, drawn inside its range: float32 [n, 3] in 0..255."""
    ranges = np.array([PALETTE[name] for name in COLOURS])[indices]  # [n, 3, 2]
    hue, saturation, value = (ranges[..., 0] + (ranges[..., 1] - ranges[..., 0]) * rng.random(ranges.shape[:2])).T
    # HSV to RGB: channel k sits k/3 of the circle away from the hue.
    sector = (np.array([[5.0, 3.0, 1.0]]) + (hue % 360)[:, None] / 60) % 6
    ramp = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    rgb: npt.NDArray[np.float32] = (255 * value[:, None] * (1 - saturation[:, None] * ramp)).astype(np.float32)
    return rgb


def colour_pairs(
    n: int, look: Look, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Foreground and background colours, float32 [n, 3] each, with at least `look.contrast` between their greys."""
    front = rng.integers(0, 256, (n, 3)).astype(np.float32)
    back = separated(front, look.contrast, rng)
    plain = rng.random(n) < look.plain
    dark = rng.random(n) < 0.65
    front[plain] = np.where(dark[plain, None], 0.0, 255.0)
    back[plain] = np.where(dark[plain, None], 255.0, 0.0)
    return front, back


def separated(colour: npt.NDArray[np.float32], contrast: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Random colours whose grey level is at least `contrast` away from that of `colour` (best of 24 draws)."""
    draws = rng.integers(0, 256, (24, *colour.shape)).astype(np.float32)
    far = np.abs(draws.mean(-1) - colour.mean(-1)) >= contrast
    first = np.where(far.any(0), far.argmax(0), np.abs(draws.mean(-1) - colour.mean(-1)).argmax(0))
    chosen: npt.NDArray[np.float32] = draws[first, np.arange(len(colour))]
    return chosen


def warp(pictures: Tensor, look: Look, turn: npt.NDArray[np.float32], rng: np.random.Generator) -> Tensor:
    """Turn, scale and shift pictures [n, c, 32, 32] float32; outside is zero."""
    n = len(pictures)
    # Rows grow downwards and the grid maps output to input: a turn of the picture to the left is a negative angle.
    angle = -np.deg2rad(turn + look.lean + rng.uniform(-look.tilt, look.tilt, n))
    # Stored glyphs span 30 of 32 pixels; a sampling step of `zoom` shows them at the wanted extent.
    zoom = (30 / 32) / rng.uniform(*look.extent, n)
    shift = rng.uniform(-look.shift, look.shift, (2, n)) * 2 / SIDE
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    x, y = -(cos * shift[0] + sin * shift[1]), sin * shift[0] - cos * shift[1]
    matrices = np.stack([np.stack([cos, sin, x], -1), np.stack([-sin, cos, y], -1)], 1).astype(np.float32)
    grid = F.affine_grid(torch.from_numpy(matrices), [n, pictures.shape[1], SIDE, SIDE], align_corners=False)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _blur(images: Tensor) -> Tensor:
    weights = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (weights[:, None] * weights[None]).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def draw(
    glyphs: npt.NDArray[np.uint8],
    look: Look,
    rng: np.random.Generator,
    *,
    turn: npt.NDArray[np.float32] | None = None,
    front: npt.NDArray[np.float32] | None = None,
    back: npt.NDArray[np.float32] | None = None,
) -> Tensor:
    """Images uint8 [n, 3, 32, 32] of glyphs [n, 32, 32] (coverage) or [n, 4, 32, 32] (RGBA).

    `turn` (degrees, counter-clockwise) is added to the random tilt; `front` and `back` fix the colours [n, 3].
    """
    n = len(glyphs)
    random_front, random_back = colour_pairs(n, look, rng)
    back = random_back if back is None else back
    pictures = torch.from_numpy(np.ascontiguousarray(glyphs)).float() / 255
    if look.mirror:
        pictures = pictures.flip(-1)
    if pictures.dim() == 3:
        pictures = pictures[:, None]
    else:  # premultiply, so that interpolation does not bleed the colour of transparent pixels
        pictures = torch.cat([pictures[:, :3] * pictures[:, 3:], pictures[:, 3:]], 1)
    angles = np.zeros(n, dtype=np.float32) if turn is None else turn
    warped = warp(pictures, look, angles, rng)
    cover = warped[:, -1:]
    ground = torch.from_numpy(back)[:, :, None, None].expand(n, 3, SIDE, SIDE)
    if look.ghost > 0:
        other = warp(pictures[torch.from_numpy(rng.permutation(n))], look, angles + 90, rng)[:, -1:]
        tint = torch.from_numpy(separated(back, 0.0, rng))[:, :, None, None]
        ground = ground + look.ghost * other * (tint - ground)
    if glyphs.ndim == 3:
        ink = torch.from_numpy(random_front if front is None else front)[:, :, None, None]
        images = ground + cover * (ink - ground)
    else:
        images = warped[:, :3] * 255 + (1 - cover) * ground
    smoothed = torch.from_numpy(rng.random(n) < look.blur)
    if smoothed.any():
        images = torch.where(smoothed[:, None, None, None], _blur(images), images)
    if look.noise[1] > 0:
        sigma = rng.uniform(*look.noise, n) * (rng.random(n) < look.noisy)
        bank = torch.from_numpy(rng.standard_normal(NOISE_BANK, dtype=np.float32))
        windows = bank.unfold(0, 3 * SIDE * SIDE, 1)
        offsets = torch.from_numpy(rng.integers(0, len(windows), n))
        deviation = torch.from_numpy(sigma.astype(np.float32))[:, None, None, None]
        images = images + windows[offsets].view(n, 3, SIDE, SIDE) * deviation
    return images.round_().clamp_(0, 255).to(torch.uint8)
