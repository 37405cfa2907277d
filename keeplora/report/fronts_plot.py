"""The chart of fronts: every method's learning rates, Transfer against Last."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Sheet

from keeplora.report.comparison_plots import name_points
from keeplora.report.fronts import Fronts, on_front, place
from keeplora.report.plots import colours
from keeplora.report.style import GRID, INK, MARKERS, SOFT, literal, plain, save
from keeplora.train.config import RunConfig


def plot_fronts(path: Path, config: RunConfig, fronts: Fronts) -> None:
    """Draw ``fronts_figure`` into a file."""
    save(fronts_figure(config, fronts), path)


@literal
def fronts_figure(
    config: RunConfig,
    fronts: Fronts,
    *,
    size: tuple[float, float] = (11.5, 8.4),
    titled: bool = True,
    numbers: str = "fronts.csv",
) -> Sheet:
    """A line through the settings of each method that none of its others beats; those that one beats are hollow.

    ``numbers`` tells where those are that lie outside the frame.
    """
    palette = colours(list(fronts.points))
    sheet = Sheet(figsize=size, layout="constrained")
    axes = sheet.subplots()
    zero = place(fronts.zero_shot)
    axes.axvline(zero[0], color=INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    axes.axhline(zero[1], color=INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    axes.scatter(*zero, marker="*", s=190, color=INK, zorder=4)
    named, shown = [(*zero, "zero-shot")], [zero]
    for i, (method, points) in enumerate(fronts.points.items()):
        colour, marker = palette[method], MARKERS[i % len(MARKERS)]
        best = on_front([place(one) for one in points])
        line = sorted(place(one) for one, on in zip(points, best, strict=True) if on)
        axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.8, zorder=2)
        for one, on in zip(points, best, strict=True):
            x, y = one.figures["transfer"], one.figures["last"]
            axes.errorbar(x.mean, y.mean, xerr=x.error, yerr=y.error, color=colour, linewidth=0.9,
                          alpha=0.45 if on else 0.2, zorder=2)  # fmt: skip
            axes.scatter(x.mean, y.mean, marker=marker, s=62 if on else 34, color=colour if on else "white",
                         edgecolor="white" if on else colour, linewidth=0.9, zorder=3)  # fmt: skip
            named.append((x.mean, y.mean, ""))
        named.append((*line[0], method))
        shown += line
    outside = _frame(axes, shown, [one[:2] for one in named])
    plain(axes)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_xlabel("Transfer: accuracy on tasks not yet learned (%)", color=SOFT)
    axes.set_ylabel("Last: accuracy on all tasks at the end (%)", color=SOFT)
    if titled:
        axes.set_title("What is learned and kept, against what is left of the zero-shot ability, over learning rates",
                       loc="left", fontsize=12.5, fontweight="bold", color=INK)  # fmt: skip
    seeds = f"{len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''}"
    note = (
        f"{config.benchmark}, {config.split} split, {seeds}; bars: error of seeds and items; line: a method's front; "
        "hollow: another rate of the method is better; dashed: before learning"
    )
    if outside:
        which = "1 hollow point is" if outside == 1 else f"{outside} hollow points are"
        note += f"; {which} outside the frame, the numbers are in {numbers}"
    sheet.supxlabel(fill(note, int(13 * size[0])), fontsize=9, color=SOFT)
    name_points(sheet, axes, named, palette)
    return sheet


def _frame(axes: Axes, shown: list[tuple[float, float]], points: list[tuple[float, float]]) -> int:
    """Show what is on a front and a little around it: rates at which all is lost would press the rest together.

    Returns how many points that leaves outside.
    """
    low, high = np.min(shown, axis=0), np.max(shown, axis=0)
    border = np.maximum(0.12 * (high - low), 2.0)
    axes.set_xlim(low[0] - border[0], high[0] + border[0])
    axes.set_ylim(low[1] - border[1], high[1] + border[1])
    return int((np.abs(np.array(points) - (low + high) / 2) > (high - low) / 2 + border).any(1).sum())
