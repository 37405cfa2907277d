"""The room that is left: a chart of every layer, and the figures of a benchmark's runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keeplora._calls import named
from keeplora.methods import Capacity, LayerCapacity
from keeplora.train.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PRETRAINED, _FREE = "#33363b", "#f0f0f0"


def record_capacity(record: RunRecord) -> Capacity | None:
    """The capacity at the end of a run; None where its method keeps no basis."""
    return Capacity.of_rows(record.capacity, record.finished_tasks) if record.capacity else None


def tightest_run(records: Sequence[RunRecord]) -> tuple[RunRecord, Capacity] | None:
    """Of one method's runs the one with room for the fewest tasks, then with the least free space."""
    limited = [(record, capacity) for record in records if (capacity := record_capacity(record)) is not None]

    def room(run: tuple[RunRecord, Capacity]) -> tuple[float, float]:
        capacity = run[1]
        return (float("inf") if capacity.forecast is None else capacity.forecast, capacity.free_share)

    return min(limited, key=room, default=None)


@named
def plot_capacity(
    path: str | os.PathLike[str], capacities: Mapping[str, Capacity], tasks: Sequence[str] | None = None
) -> bool:
    """Draw how the tasks fill the input space of every adapted layer; False, and no file, where there is none.

    A panel for each title. The number above a layer says how many more tasks like the last one fit.

    Args:
        capacities: By title, for example ``{"my model": keeper.capacity()}``.
        tasks: Names of the tasks so far.

    Raises:
        ValueError: ``tasks`` does not have one name for each task that a capacity counts.
    """
    for title, capacity in capacities.items():
        if tasks is not None and len(tasks) != capacity.tasks:
            raise ValueError(
                f"plot_capacity: tasks must have a name for each of {capacity.tasks} tasks, got {list(tasks)} [{title}]"
            )
    if not capacities:
        return False
    from matplotlib.figure import Figure  # optional, and slow to import

    from keeplora.report.style import INK, literal, save

    layers = max(map(len, capacities.values()))
    figure = Figure(figsize=(max(8.0, 2 + 0.26 * layers), 0.9 + 3.0 * len(capacities)), layout="constrained")
    all_axes = figure.subplots(len(capacities), 1, squeeze=False)[:, 0]
    for axes, (title, capacity) in zip(all_axes, capacities.items(), strict=True):
        literal(_panel)(axes, title, capacity, tasks or [f"task {i + 1}" for i in range(capacity.tasks)])
    figure.suptitle("Protected share of each layer's input space", fontsize=13, fontweight="bold", color=INK)
    save(figure, Path(path))
    return True


def _panel(axes: Axes, title: str, capacity: Capacity, tasks: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    from keeplora.report.style import INK, SOFT, plain

    names = [_short(layer) for layer in capacity]
    sizes = np.array([layer.in_features for layer in capacity], dtype=np.float64)
    added = np.array([layer.added_by_task for layer in capacity], dtype=np.float64).reshape(len(capacity), -1)
    before = np.array([layer.protected for layer in capacity]) - added.sum(1)
    x = np.arange(len(names), dtype=np.float64)
    x += np.cumsum([0, *(a[0] != b[0] for a, b in pairwise(names))])  # a gap between blocks
    shades = _shades(len(tasks))
    parts = [("pretrained", _PRETRAINED, before), *zip((f"+ {n}" for n in tasks), shades, added.T, strict=True)]
    bottom = np.zeros(len(names))
    for _, shade, directions in (*parts, ("free", _FREE, sizes - before - added.sum(1))):
        axes.bar(x, 100 * directions / sizes, 0.86, bottom=bottom, color=shade, linewidth=0)
        bottom += 100 * directions / sizes
    for place, layer in zip(x, capacity, strict=True):
        if layer.forecast is not None:
            axes.text(place, 101, str(layer.forecast), ha="center", va="bottom", fontsize=7, color=INK)
    axes.set_xticks(x, [part for _, part in names], fontsize=7)
    for block in dict.fromkeys(name for name, _ in names):
        places = [place for place, (name, _) in zip(x, names, strict=True) if name == block]
        axes.text(float(np.mean(places)), -0.13, block, transform=axes.get_xaxis_transform(), ha="center", va="top",
                  fontsize=8, color=SOFT)  # fmt: skip
    axes.set_ylim(0, 100)
    axes.set_xlim(x[0] - 0.8, x[-1] + 0.8)
    axes.set_ylabel("protected (%)", color=SOFT)
    axes.set_title(f"{title}; above: more tasks that fit", loc="left", fontsize=11, color=INK, pad=12)
    keys = [Patch(color=shade, label=text) for text, shade, _ in (*parts, ("free", _FREE, None))]
    axes.legend(handles=keys, frameon=False, fontsize=8, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    plain(axes)
    axes.grid(visible=False)
    axes.tick_params(axis="x", length=0)


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    ramp = colormaps["viridis"]
    return [ramp(0.12 + 0.8 * i / max(count - 1, 1)) for i in range(count)]


def _short(layer: LayerCapacity) -> tuple[str, str]:
    """A block's short name and the part inside it: ("vision 3", "q")."""
    part = layer.name.rsplit(".", 1)[-1]
    short = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o", "o_proj": "o"}
    return f"{layer.tower} {layer.depth}", short.get(part, part)
