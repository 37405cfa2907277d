"""What all charts look like."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from keeplora._files import write_atomic

INK, SOFT, GRID = "#222222", "#666666", "#e4e4e4"
MARKERS = "osD^vPX"
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.2, 1.6)), (0, (6, 2, 1.5, 2)))
"""Of curves, in this order: where curves coincide, the gaps of the later one show the earlier one."""

literal = rc_context({"text.parse_math": False})
"""Decorates what makes a figure: names of tasks are text, also where they hold two dollar signs."""


def plain(axes: Axes) -> None:
    """Horizontal lines and two spines, in grey."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#bbbbbb")


@literal
def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all; needs no display."""
    FigureCanvasAgg(figure)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png", facecolor="white"))


@literal
def svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element for a page: text as text, and every id begins with ``name``.

    Names with a white rim, which matplotlib would draw as shapes, are in groups whose id holds "halo". The page's
    style sheet gives the rim back, and round joints.
    """
    for number, text in enumerate(figure.findobj(Text)):
        if text.get_path_effects():
            text.set_path_effects([])
            text.set_gid(f"halo{number}")
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": None}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    whole = buffer.getvalue()
    bare = re.sub(r"<(metadata|style)\b.*?</\1>", "", whole[whole.index("<svg") :], flags=re.DOTALL)
    return re.sub(r"<[^>]*>", lambda tag: _own_ids(tag[0], name), bare)


def _own_ids(tag: str, name: str) -> str:
    tag = tag.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:href=", "href=")
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag)


def luminance(colour: str) -> float:
    """Relative luminance of a colour (WCAG 2), from 0 for black to 1 for white."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast of two colours (WCAG 2), from 1 to 21; text needs 4.5.

    >>> round(contrast("black", "white"))
    21
    """
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def readable(colour: str) -> str:
    """``colour``, darkened until it can be read as text on white.

    >>> readable("#222222"), contrast(readable("#e07b28"), "white") >= 4.5
    ('#222222', True)
    """
    shade = to_rgb(colour)
    while contrast(to_hex(shade), "white") < 4.5:
        shade = (0.96 * shade[0], 0.96 * shade[1], 0.96 * shade[2])
    return to_hex(shade)
