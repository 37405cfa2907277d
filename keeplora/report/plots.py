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

from keeplora.report.style import INK, SOFT, plain, save
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
    """One colour for each method, the same in every chart."""
    spare = iter(_SPARE * (1 + len(labels)))
    return {label: _METHOD_COLOURS.get(label) or next(spare) for label in labels}


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
    _bars(right, summary, labels, palette)
    figure.supxlabel(
        f"benchmark {summary['benchmark']}, accuracy on {summary['split']} images; {spread}",
        fontsize=9, color=SOFT,
    )  # fmt: skip
    save(figure, path)


def _curves(
    axes: Axes, summary: Mapping[str, Any], runs: Mapping[str, Sequence[RunRecord]], palette: Mapping[str, str]
) -> None:
    tasks = summary["tasks"]
    start = summary["zero_shot"]["last"]["mean"]
    x = np.arange(len(tasks) + 1)
    ends: list[tuple[float, str]] = []
    for label, records in runs.items():
        curves = np.array([[start, *(100 * np.mean(record.accuracy, axis=1))] for record in records])
        mean, std = curves.mean(0), _std(curves)
        axes.fill_between(x, mean - std, mean + std, color=palette[label], alpha=0.18, linewidth=0)
        axes.plot(x, mean, color=palette[label], linewidth=2.4, marker="o", markersize=4.5)
        ends.append((float(mean[-1]), label))
    axes.axhline(start, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.04 * (high - low))
    end_labels(axes, [*ends, (start, "zero-shot")], float(x[-1]), palette)
    axes.set_xlim(-0.2, len(tasks) + 0.1)
    axes.set_xticks(x, ["start", *(f"+ {name}" for name in tasks)], rotation=35, ha="right")
    axes.set_title("Mean accuracy over all tasks, after each task", loc="left", fontsize=11.5, color=INK)
    axes.set_ylabel("accuracy (%)", color=SOFT)
    plain(axes)


def end_labels(
    axes: Axes, ends: list[tuple[float, str]], x: float, palette: Mapping[str, str], *, signed: bool = False
) -> None:
    """Names at the right end of their lines, pushed apart where lines end close together."""
    low, high = axes.get_ylim()
    gap = 0.05 * (high - low)
    ends = sorted(ends)
    places = [value for value, _ in ends]
    for _ in range(50):
        for i in range(len(places) - 1):
            overlap = gap - (places[i + 1] - places[i])
            if overlap > 1e-9:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
    for place, (value, label) in zip(places, ends, strict=True):
        number = f"{value:+.1f}" if signed else f"{value:.1f}"
        axes.annotate(
            f"{label}  {number}", (x, value), xytext=(x + 0.25, place), textcoords="data", va="center",
            fontsize=10, fontweight="bold", color=palette.get(label, INK), annotation_clip=False,
        )  # fmt: skip


def _bars(axes: Axes, summary: Mapping[str, Any], labels: Sequence[str], palette: Mapping[str, str]) -> None:
    width = 0.8 / len(labels)
    top = 0.0
    zeros = [summary["zero_shot"][key]["mean"] for key, _, _ in _BARS]
    for i, label in enumerate(labels):
        values = [summary["methods"][label][key] for key, _, _ in _BARS]
        places = np.arange(len(_BARS)) - 0.4 + width * (i + 0.5)
        means, stds = [v["mean"] for v in values], [v["std"] for v in values]
        axes.bar(
            places, means, 0.92 * width, yerr=stds if any(stds) else None, color=palette[label], label=label,
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
        )  # fmt: skip
        for place, mean, std, zero in zip(places, means, stds, zeros, strict=True):
            inside = 0 < zero - mean - std < 5  # there the line of zero-shot would run through the number
            axes.text(
                place, mean - std - 0.8 if inside else mean + std + 0.8, f"{mean:.1f}", ha="center",
                va="top" if inside else "bottom", fontsize=8.5, color=INK, zorder=5,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )  # fmt: skip
        top = max(top, *(mean + std for mean, std in zip(means, stds, strict=True)))
    for i, zero in enumerate(zeros):
        top = max(top, zero)
        line = axes.plot([i - 0.45, i + 0.45], [zero, zero], color=INK, linewidth=1.4, linestyle=(0, (4, 3)))[0]
        if i == 0:
            line.set_label("zero-shot")
    axes.set_ylim(0, 1.22 * top)
    axes.set_xticks(range(len(_BARS)), [f"{name}\n{text}" for _, name, text in _BARS])
    axes.set_title("Higher is better", loc="left", fontsize=11.5, color=INK)
    axes.legend(framealpha=1, edgecolor="none", ncols=3, loc="upper center", fontsize=9.5)
    plain(axes)


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
