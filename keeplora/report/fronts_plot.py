"""The chart of fronts: every method's learning rates, Transfer against Last."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure as Sheet

from keeplora.report.comparison_plots import MARKERS, name_points
from keeplora.report.fronts import Fronts, on_front, place
from keeplora.report.plots import colours
from keeplora.report.style import GRID, INK, SOFT, plain, save
from keeplora.train.config import RunConfig


def plot_fronts(path: Path, config: RunConfig, fronts: Fronts) -> None:
    """A line through the settings of each method that none of its others beats; those that one beats are hollow."""
    palette = colours(list(fronts.points))
    sheet = Sheet(figsize=(11.5, 8.4), layout="constrained")
    axes = sheet.subplots()
    zero = place(fronts.zero_shot)
    axes.axvline(zero[0], color=INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    axes.axhline(zero[1], color=INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    axes.scatter(*zero, marker="*", s=190, color=INK, zorder=4)
    named = [(*zero, "zero-shot")]
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
            named.append((x.mean, y.mean, method if on and (x.mean, y.mean) == line[0] else ""))
    axes.margins(0.1)
    plain(axes)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_xlabel("Transfer: accuracy on tasks not yet learned (%)", color=SOFT)
    axes.set_ylabel("Last: accuracy on all tasks at the end (%)", color=SOFT)
    axes.set_title("What is learned and kept, against what is left of the zero-shot ability, over learning rates",
                   loc="left", fontsize=12.5, fontweight="bold", color=INK)  # fmt: skip
    seeds = f"{len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''}"
    sheet.supxlabel(
        f"{config.benchmark}, {config.split} split, {seeds}; bars: error of seeds and items; line: a method's front; "
        "hollow: another rate of the method is better; dashed: before learning",
        fontsize=9, color=SOFT,
    )  # fmt: skip
    name_points(sheet, axes, named, palette)
    save(sheet, path)
