"""Charts of a comparison, legible with twenty methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from keeplora.methods import Capacity
from keeplora.report.plots import colours, end_labels, line_marks, staircase
from keeplora.report.style import GRID, INK, MARKERS, SOFT, literal, plain, readable, save
from keeplora.train.record import RunRecord

_ORDER = {part: place for place, part in enumerate("qkvo")}


def plot_last_against_transfer(path: Path, summary: Mapping[str, Any]) -> None:
    """Draw ``last_against_transfer`` into a file."""
    save(last_against_transfer(summary), path)


@literal
def last_against_transfer(
    summary: Mapping[str, Any], *, size: tuple[float, float] = (9.6, 7.2), titled: bool = True
) -> Figure:
    """What is known at the end against what is left of the zero-shot ability; up and to the right is better."""
    methods = summary["methods"]
    palette = colours(list(methods))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    zero = summary["zero_shot"]
    for line, key in ((axes.axhline, "last"), (axes.axvline, "transfer")):
        line(zero[key]["mean"], color=INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    points: list[tuple[float, float, str]] = [(zero["transfer"]["mean"], zero["last"]["mean"], "zero-shot")]
    axes.scatter(*points[0][:2], marker="*", s=190, color=INK, zorder=4)
    for i, (label, values) in enumerate(methods.items()):
        x, y = values["transfer"], values["last"]
        axes.errorbar(x["mean"], y["mean"], xerr=x["std"] or 0.0, yerr=y["std"] or 0.0, color=palette[label],
                      linewidth=1.1, alpha=0.6, zorder=2)  # fmt: skip
        axes.scatter(x["mean"], y["mean"], marker=MARKERS[i % len(MARKERS)], s=74, color=palette[label],
                     edgecolor="white", linewidth=0.9, zorder=3)  # fmt: skip
        points.append((x["mean"], y["mean"], label))
    axes.margins(0.12)
    plain(axes)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_xlabel("Transfer: accuracy on tasks not yet learned (%)", color=SOFT)
    axes.set_ylabel("Last: accuracy on all tasks at the end (%)", color=SOFT)
    if titled:
        axes.set_title("What is learned and kept, against what is left of the zero-shot ability", loc="left",
                       fontsize=12.5, fontweight="bold", color=INK)  # fmt: skip
    seeds = len(summary["seeds"])
    spread = f"bars: ± 1 std over {seeds} seeds" if seeds > 1 else "one seed"
    figure.supxlabel(f"{summary['benchmark']}, {summary['split']} split; {spread}; dashed: the model before learning",
                     fontsize=9, color=SOFT)  # fmt: skip
    name_points(figure, axes, points, palette)
    return figure


def name_points(
    figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str]], palette: Mapping[str, str]
) -> None:
    """Write every name where it covers neither a point nor another name, near its own point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]  # the layout must stand before anything is measured
    places = axes.transData.transform([point[:2] for point in points])
    frame = axes.get_window_extent()
    scale = figure.dpi / 72
    taken = [(x - 6 * scale, y - 6 * scale, x + 6 * scale, y + 6 * scale) for x, y in places]
    x, y = places[0]  # the lines of zero-shot
    taken += [(frame.x0, y - scale, frame.x1, y + scale), (x - scale, frame.y0, x + scale, frame.y1)]
    for (x, y), (_, _, label) in sorted(zip(places, points, strict=True), key=lambda item: -item[0][1]):
        width, height = 6.0 * len(label) * scale, 12 * scale
        best, cost = (0.0, 0.0, 0.0), float("inf")
        for radius, angle in product((11, 18, 28, 40, 56, 76), np.arange(0, 2 * np.pi, np.pi / 12)):
            dx, dy = radius * scale * np.cos(angle), radius * scale * np.sin(angle)
            left = x + dx - width * (0.5 - 0.5 * np.cos(angle))
            box = (left, y + dy - height / 2, left + width, y + dy + height / 2)
            covered = sum(_overlap(box, other) for other in taken) / height
            outside = max(0.0, frame.x0 - box[0], box[2] - frame.x1, frame.y0 - box[1], box[3] - frame.y1)
            worth = 3 * covered + 10 * outside + 0.35 * radius + abs(np.sin(angle))
            if worth < cost:
                best, cost = (left + width / 2, y + dy, radius), worth
        taken.append((best[0] - width / 2, best[1] - height / 2, best[0] + width / 2, best[1] + height / 2))
        here, there = (tuple(axes.transData.inverted().transform(at)) for at in ((x, y), best[:2]))
        axes.annotate(
            label, here, xytext=there, ha="center", va="center", fontsize=9.5,
            fontweight="bold", color=readable(palette.get(label, INK)), zorder=5,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops=None if best[2] < 20 else {"arrowstyle": "-", "color": SOFT, "linewidth": 0.7, "shrinkB": 4},
        )  # fmt: skip


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


@literal
def plot_forgetting(path: Path, summary: Mapping[str, Any], runs: Mapping[str, Sequence[RunRecord]]) -> None:
    """How a task's accuracy changes while others are learned after it: mean over tasks and seeds."""
    labels = list(summary["methods"])
    palette = colours(labels)
    tasks = len(summary["tasks"])
    figure = Figure(figsize=(10, max(5.2, 2.2 + 0.3 * len(labels))), layout="constrained")
    axes = figure.subplots()
    x = np.arange(tasks)
    ends = []
    for i, label in enumerate(labels):
        curves = np.array([_changes(100 * np.asarray(record.accuracy)) for record in runs[label]])
        mean = curves.mean(0)
        axes.plot(x, mean, color=palette[label], **line_marks(i, len(labels)))
        ends.append((float(mean[-1]), label))
    axes.axhline(0, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
    end_labels(axes, ends, float(x[-1]), palette, signed=True)
    axes.set_xlim(-0.15, max(tasks - 1, 1) + 0.05)
    axes.set_xticks(x)
    plain(axes)
    axes.set_xlabel("tasks learned since", color=SOFT)
    axes.set_ylabel("change of accuracy since right after learning (points)", color=SOFT)
    axes.set_title("Forgetting: what happens to a task while others are learned after it", loc="left", fontsize=12.5,
                   fontweight="bold", color=INK)  # fmt: skip
    figure.supxlabel(f"{summary['benchmark']}, {summary['split']} split; mean over the tasks that are that old",
                     fontsize=9, color=SOFT)  # fmt: skip
    save(figure, path)


def _changes(accuracy: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """Mean over tasks j of acc[j + k, j] − acc[j, j], for k = 0 … T − 1."""
    tasks = len(accuracy)
    return [float(np.mean([accuracy[j + k, j] - accuracy[j, j] for j in range(tasks - k)])) for k in range(tasks)]


@literal
def plot_matrices(path: Path, runs: Mapping[str, Sequence[RunRecord]]) -> None:
    """The accuracy matrices of all methods on one sheet, mean over seeds."""
    columns = min(4, len(runs))
    rows = -(-len(runs) // columns)
    tasks = next(iter(runs.values()))[0].tasks
    size = 1.1 + 0.34 * len(tasks)
    figure = Figure(figsize=(1.2 + size * columns, 1.5 + (size + 0.1) * rows), layout="constrained")
    sheet = figure.subplots(rows, columns, squeeze=False)
    for axes in sheet.flat[len(runs) :]:
        axes.set_visible(False)
    image = None
    for number, (label, records) in enumerate(runs.items()):
        axes = sheet.flat[number]
        matrix = 100 * np.mean([record.accuracy for record in records], axis=0)
        image = axes.imshow(matrix, cmap="YlGnBu", vmin=0, vmax=100)
        for i, j in product(range(len(tasks)), repeat=2):
            dark, diagonal = matrix[i, j] > 55, i == j
            axes.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if dark else INK, fontweight="bold" if diagonal else "normal")  # fmt: skip
        staircase(axes, len(tasks))
        axes.set_title(
            f"{label}   Last {matrix[-1].mean():.1f}", loc="left", fontsize=9.5, fontweight="bold", color=INK
        )
        lowest = number + columns >= len(runs)
        axes.set_xticks(range(len(tasks)), tasks if lowest else [], rotation=45, ha="right", fontsize=7.5)
        axes.set_yticks(
            range(len(tasks)), [f"+ {task}" for task in tasks] if number % columns == 0 else [], fontsize=7.5
        )
        axes.tick_params(length=0, colors=SOFT)
        for spine in axes.spines.values():
            spine.set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=sheet, shrink=min(1.0, 1.4 / rows), fraction=0.03, pad=0.02, anchor=(0, 1))
    bar.outline.set_visible(False)
    figure.suptitle("Accuracy on each task (column) after each task (row), in percent", x=0.01, ha="left",
                    fontsize=12.5, fontweight="bold", color=INK)  # fmt: skip
    save(figure, path)


@literal
def plot_protected(path: Path, capacities: Mapping[str, Capacity]) -> bool:
    """The share of each layer's input space that is protected at the end, by depth; False where nobody protects."""
    if not capacities:
        return False
    labels = list(capacities)
    layers = sorted(
        {(layer.tower, layer.depth, _part(layer.name)) for capacity in capacities.values() for layer in capacity},
        key=lambda layer: (layer[0] != "vision", *layer[:2], _ORDER.get(layer[2], len(_ORDER)), layer[2]),
    )
    share = np.full((len(labels), len(layers)), np.nan)
    for row, capacity in enumerate(capacities.values()):
        for layer in capacity:
            column = layers.index((layer.tower, layer.depth, _part(layer.name)))
            share[row, column] = 100 * layer.protected / layer.in_features
    figure = Figure(figsize=(max(8.0, 2.6 + 0.4 * len(layers)), 2.1 + 0.36 * len(labels)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    for row, column in product(range(len(labels)), range(len(layers))):
        value = share[row, column]
        text, colour = ("·", SOFT) if np.isnan(value) else (f"{value:.0f}", "white" if value > 55 else INK)
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
    blocks = [layer[:2] for layer in layers]
    for column in range(1, len(layers)):
        if blocks[column] != blocks[column - 1]:
            wide = blocks[column][0] != blocks[column - 1][0]
            axes.axvline(column - 0.5, color="white" if not wide else INK, linewidth=1.6)
    for block in dict.fromkeys(blocks):
        middle = float(np.mean([i for i, other in enumerate(blocks) if other == block]))
        axes.text(middle, -0.75, f"{block[1]}", ha="center", va="bottom", fontsize=8, color=SOFT)
    for tower in dict.fromkeys(tower for tower, _ in blocks):
        middle = float(np.mean([i for i, other in enumerate(blocks) if other[0] == tower]))
        axes.text(middle, -1.35, f"{tower}, depth", ha="center", va="bottom", fontsize=8.5, color=INK)
    axes.set_xticks(range(len(layers)), [part for _, _, part in layers], fontsize=7.5)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(length=0, colors=SOFT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.015)
    bar.outline.set_visible(False)
    figure.suptitle("Protected share of each adapted layer's input space after the last task (%)", x=0.01, ha="left",
                    fontsize=12.5, fontweight="bold", color=INK)  # fmt: skip
    save(figure, path)
    return True


def _part(name: str) -> str:
    """The last components of a layer's name, as short as they tell layers of one block apart."""
    parts = name.split(".")
    last = f"{parts[-2]}.{parts[-1]}" if parts[-1] == "dense" and len(parts) > 1 else parts[-1]
    return {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o", "o_proj": "o", "query": "q", "key": "k",
            "value": "v", "output.dense": "o"}.get(last, last)  # fmt: skip
