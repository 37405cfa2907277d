"""What all charts look like."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from keeplora._files import write_atomic

INK, SOFT, GRID = "#222222", "#666666", "#e4e4e4"


def plain(axes: Axes) -> None:
    """Horizontal lines and two spines, in grey."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#bbbbbb")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all; needs no display."""
    FigureCanvasAgg(figure)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png", facecolor="white"))
