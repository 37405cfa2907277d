"""Charts of a benchmark: the comparison and the accuracy matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from keeplora.report.style import DASHES, INK, MARKERS, SOFT, literal, plain, readable, save
from keeplora.train.record import RunRecord

Array = NDArray[np.float64]

_METHOD_COLOURS = {"full": "#8c8c8c", "lora": "#e07b28", "keeplora": "#3b78c3", "keeplora++": "#14866d"}
_SPARE = (
    "#9657a8", "#c23b5a", "#7a6a2f", "#2aa3b5", "#5b5fc7", "#a0522d", "#4f8f2f", "#d0679d", "#b8860b", "#35607d",
    "#8b1e3f", "#6d8f8a", "#c46f5c", "#3f3f8f", "#98a33a", "#7b4b94",
)  # fmt: skip
_BARS = (("last", "Last", "all tasks, at the end"), ("avg", "Avg", "all tasks, at all times"),
         ("transfer", "Transfer", "tasks not yet learned"))  # fmt: skip


def colours(labels: Sequence[str]) -> dict[str, str]:
    """One colour for each method, the same in every chart, at whichever learning rate.

    >>> colours(["lora@0.001"]) == {"lora@0.001": colours(["lora"])["lora"]}
    True
    """
    spare = iter(_SPARE * (1 + len(labels)))
    methods = [label.partition("@")[0] for label in labels]
    names = methods if len(set(methods)) == len(methods) else labels  # of several rates of a method each has its own
    return {label: _METHOD_COLOURS.get(name) or next(spare) for label, name in zip(labels, names, strict=True)}


@literal
def plot_comparison(path: Path, summary: Mapping[str, Any], runs: Mapping[str, Sequence[RunRecord]]) -> None:
    """Accuracy over the course of learning, and Last, Avg, Transfer, with zero-shot as the line to beat."""
    labels = list(summary["methods"])
    palette = colours(labels)
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    seeds = len(summary["seeds"])
    spread = f"bands and whiskers: ± 1 std over {seeds} seeds" if seeds > 1 else "one seed"
    figure.suptitle(
        f"Learning {len(summary['tasks'])} tasks one after another: what is learned, what is kept",
        fontsize=15, fontweight="bold", color=INK,
    )  # fmt: skip
    _curves(left, summary, {label: runs[label] for label in labels}, palette)
    left.set_title("Mean accuracy over all tasks, after each task", loc="left", fontsize=11.5, color=INK)
    _bars(right, summary, labels, palette)
    figure.supxlabel(
        f"benchmark {summary['benchmark']}, accuracy on the {summary['split']} split; {spread}",
        fontsize=9, color=SOFT,
    )  # fmt: skip
    save(figure, path)


@literal
def curves_figure(summary: Mapping[str, Any], runs: Mapping[str, Sequence[RunRecord]]) -> Figure:
    """Accuracy over the course of learning by itself, without a title."""
    labels = list(summary["methods"])
    figure = Figure(figsize=(8.2, max(4.4, 1.6 + 0.22 * len(labels))), layout="constrained")
    _curves(figure.subplots(), summary, {label: runs[label] for label in labels}, colours(labels))
    return figure


def _curves(
    axes: Axes, summary: Mapping[str, Any], runs: Mapping[str, Sequence[RunRecord]], palette: Mapping[str, str]
) -> None:
    tasks = summary["tasks"]
    start = summary["zero_shot"]["last"]["mean"]
    x = np.arange(len(tasks) + 1)
    ends: list[tuple[float, str]] = []
    for i, (label, records) in enumerate(runs.items()):
        curves = np.array([[start, *(100 * np.mean(record.accuracy, axis=1))] for record in records])
        mean, std = curves.mean(0), _std(curves)
        axes.fill_between(x, mean - std, mean + std, color=palette[label], alpha=0.18, linewidth=0)
        axes.plot(x, mean, color=palette[label], **line_marks(i, len(runs)))
        ends.append((float(mean[-1]), label))
    axes.axhline(start, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.04 * (high - low))
    end_labels(axes, [*ends, (start, "zero-shot")], float(x[-1]), palette)
    axes.set_xlim(-0.2, len(tasks) + 0.1)
    axes.set_xticks(x, ["start", *(f"+ {name}" for name in tasks)], rotation=35, ha="right")
    axes.set_ylabel("accuracy (%)", color=SOFT)
    plain(axes)


def line_marks(number: int, lines: int) -> dict[str, Any]:
    """Width, dashes and sign of one of several curves: they tell curves apart that coincide.

    Each lies on wider ones, and its gaps show those. Every other sign is hollow, and larger, so that it frames another.
    """
    place = number % len(DASHES)
    hollow = number % 2 == 1
    return {
        "linewidth": 1.8 + 0.9 * (min(lines, len(DASHES)) - 1 - place),
        "linestyle": DASHES[place],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 8.5 if hollow else 5.5,
        "markerfacecolor": "none" if hollow else None,
        "markeredgewidth": 1.3 if hollow else 1.0,
    }


def end_labels(
    axes: Axes, ends: list[tuple[float, str]], x: float, palette: Mapping[str, str], *, signed: bool = False
) -> None:
    """Names at the right end of their lines, pushed apart where lines end close together, each led to its line."""
    low, high = axes.get_ylim()
    figure = axes.get_figure(root=True)
    assert figure is not None
    gap = 14.5 / (72 * 0.8 * figure.get_size_inches()[1]) * (high - low)  # a line of text; axes are 0.8 of the figure
    ends = sorted(ends)
    places = apart([value for value, _ in ends], gap)
    for place, (value, label) in zip(places, ends, strict=True):
        number = f"{value:+.1f}" if signed else f"{value:.1f}"
        axes.annotate(
            f"{label}  {number}", (x, value), xytext=(x + 0.3, place), textcoords="data", va="center",
            fontsize=10, fontweight="bold", color=readable(palette.get(label, INK)), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": palette.get(label, INK), "linewidth": 0.8, "shrinkA": 2,
                        "shrinkB": 4, "relpos": (0.0, 0.5)},
        )  # fmt: skip


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels at ascending ``values``: at least ``gap`` apart, each group centred where its values are.

    >>> apart([1.0, 5.0, 5.0], 1.0)
    [1.0, 4.5, 5.5]
    """
    groups: list[list[float]] = []  # values whose labels touch
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _lowest(groups[-1], gap) < _lowest(groups[-2], gap) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_lowest(group, gap) + gap * i for group in groups for i in range(len(group))]


def _lowest(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _bars(axes: Axes, summary: Mapping[str, Any], labels: Sequence[str], palette: Mapping[str, str]) -> None:
    width = 0.8 / len(labels)
    zeros = [summary["zero_shot"][key]["mean"] for key, _, _ in _BARS]
    ends = [summary["methods"][label][key] for label in labels for key, _, _ in _BARS]
    top = 1.22 * (max(*zeros, *(value["mean"] + value["std"] for value in ends)) or 1.0)  # nothing was right
    axes.set_ylim(0, top)
    turned = len(labels) > 5  # the numbers stand upright, or they would run into each other
    figure = axes.get_figure(root=True)
    assert figure is not None
    point = top / (72 * 0.7 * figure.get_size_inches()[1])  # of the axes, which are about 0.7 of the figure
    for i, label in enumerate(labels):
        values = [summary["methods"][label][key] for key, _, _ in _BARS]
        places = np.arange(len(_BARS)) - 0.4 + width * (i + 0.5)
        means, stds = [v["mean"] for v in values], [v["std"] for v in values]
        axes.bar(
            places, means, 0.92 * width, yerr=stds if any(stds) else None, color=palette[label], label=label,
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
        )  # fmt: skip
        for place, mean, std, zero in zip(places, means, stds, zeros, strict=True):
            axes.text(
                place, clear_of(mean + std + 2.5 * point, (26 if turned else 9) * point, zero, 3 * point),
                f"{mean:.1f}", ha="center", va="bottom", fontsize=8.5, color=INK, zorder=5,
                rotation=90 if turned else 0, path_effects=[withStroke(linewidth=2, foreground="white")],
            )  # fmt: skip
    for i, zero in enumerate(zeros):
        line = axes.plot([i - 0.45, i + 0.45], [zero, zero], color=INK, linewidth=1.4, linestyle=(0, (4, 3)))[0]
        if i == 0:
            line.set_label("zero-shot")
    axes.set_xticks(range(len(_BARS)), [f"{name}\n{text}" for _, name, text in _BARS], fontsize=9)
    axes.set_title("Higher is better", loc="left", fontsize=11.5, color=INK)
    axes.legend(framealpha=1, edgecolor="none", ncols=3, loc="upper center", fontsize=9.5)
    plain(axes)


def clear_of(low: float, height: float, line: float, rim: float) -> float:
    """Where a label that would be from ``low`` to ``low + height`` begins so that ``line`` does not strike it through.

    >>> clear_of(10.0, 4.0, line=12.0, rim=1.0), clear_of(10.0, 4.0, line=30.0, rim=1.0)
    (13.0, 10.0)
    """
    return line + rim if low - rim < line < low + height + rim else low


@literal
def plot_matrix(path: Path, label: str, records: Sequence[RunRecord]) -> None:
    """The accuracy matrix of one method, mean over seeds; the frame marks tasks that are already learned."""
    tasks = records[0].tasks
    matrix = 100 * np.mean([record.accuracy for record in records], axis=0)
    names = list(tasks)
    if records[0].witness:
        witness = 100 * np.mean([record.witness for record in records], axis=0)
        matrix = np.concatenate([matrix, witness[:, None]], axis=1)
        names.append("witness\n(never trained)")
    rows, columns = matrix.shape
    figure = Figure(figsize=(2.6 + 0.72 * columns, 2.2 + 0.5 * rows), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    for i in range(rows):
        for j in range(columns):
            dark = matrix[i, j] > 55
            axes.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=9.5,
                      color="white" if dark else INK, fontweight="bold" if i == j else "normal")  # fmt: skip
    staircase(axes, len(tasks))
    axes.set_xticks(range(columns), names, rotation=35, ha="right")
    axes.set_yticks(range(rows), [f"after {name}" for name in tasks])
    axes.set_title(f"{label}: accuracy on each task (%)", loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_xlabel("below the line: learned before; above: not yet seen", fontsize=9, color=SOFT)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.outline.set_visible(False)
    save(figure, path)


def staircase(axes: Axes, tasks: int) -> None:
    """The line between tasks that are learned (below) and those that are not."""
    xs, ys = [-0.5], [-0.5]
    for i in range(tasks):
        xs += [i + 0.5, i + 0.5]
        ys += [i - 0.5, i + 0.5]
    axes.plot(xs, ys, color="#d1495b", linewidth=2, clip_on=False)


def _std(curves: Array) -> Array:
    return curves.std(0, ddof=1) if len(curves) > 1 else np.zeros(curves.shape[1])
