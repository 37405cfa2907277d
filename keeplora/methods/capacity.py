"""How much room the adapted weights have left, and for how many more tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, overload

from keeplora.lora import Target

__all__ = ["Capacity", "LayerCapacity", "forecast", "layer_capacity"]

LEAST = 0.0025
"""Of a gradient's energy in free space, for a task to learn: a twentieth of the gradient's length."""


def forecast(free: int, r: int, added: int, share: float | None = None) -> int | None:
    r"""How many more tasks like the last one find at least r free directions in a layer, and their gradient in them.

    $$
    n = \begin{cases} 0 & f < q \\ \lfloor (f - q) / m \rfloor + 1 & \text{otherwise} \end{cases}, \qquad
    q = \max\Bigl(r, \frac{1}{400\,\sigma}\,(f + m)\Bigr)
    $$

    Assumes that every task to come adds m directions, as the last one did, and that the share of its gradient's energy
    in free space is proportional to the free directions: the last task had $f + m$ of them and found σ there, so
    with q it finds 1/400, a twentieth of the gradient's length: eight layers that learn tasks in random subspaces learn
    next to nothing once all of them find less. Tasks that resemble those before add fewer directions, other
    kinds of inputs add more; a layer that is not counted as having room still uses what it has.

    Args:
        free: f, directions that are free now.
        r: Directions an adapter wants.
        added: m.
        share: σ in [0, 1]; None where no gradient was looked at: then q is r.

    Returns:
        None where there is room and the last task added nothing: then nothing suggests a limit.

    Examples:
        >>> forecast(20, 4, 5), forecast(3, 4, 5), forecast(20, 4, 0)
        (4, 0, None)
        >>> forecast(20, 4, 5, share=0.005), forecast(20, 4, 0, share=0.001)
        (2, 0)
    """
    if share is not None:
        if not share:
            return 0
        r = max(r, math.ceil(LEAST / share * (free + added)))
    if free < r:
        return 0
    return (free - r) // added + 1 if added else None


@dataclass(frozen=True)
class LayerCapacity:
    """The input space of one adapted weight.

    Attributes:
        name: The target, in ``tower`` at ``depth``.
        in_features: Directions in all: ``protected + free``.
        added: Directions the last task added.
        forecast: How many more tasks like the last one fit (``forecast``); None where nothing suggests a limit.
        added_by_task: Directions each task added.
        share: Of the last task's gradient energy, what lay in free space when it began; of GPM's first gradient in a
            task, and of the inputs' energy for InfLoRA, which looks at no gradient. None where nobody looked, or there
            was none.
    """

    name: str
    tower: str
    depth: int
    in_features: int
    protected: int
    free: int
    added: int
    forecast: int | None = None
    added_by_task: tuple[int, ...] = ()
    share: float | None = None

    @property
    def misses(self) -> bool:
        """Whether the next task like the last one finds too little of its gradient in free space."""
        return self.share is not None and self.share * self.free < LEAST * (self.free + self.added)


@dataclass(frozen=True)
class Capacity(Sequence[LayerCapacity]):
    """Every layer's [`LayerCapacity`][], and what they say together. Prints as a table.

    Attributes:
        layers: One entry per adapted weight.
        tasks: Tasks learned so far.
    """

    layers: tuple[LayerCapacity, ...]
    tasks: int

    @overload
    def __getitem__(self, index: int) -> LayerCapacity: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerCapacity, ...]: ...
    def __getitem__(self, index: int | slice) -> LayerCapacity | tuple[LayerCapacity, ...]:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerCapacity]:
        return iter(self.layers)

    @property
    def free_share(self) -> float:
        """Share of all layers' directions that is free."""
        return _share(self.layers, "free")

    @property
    def forecast(self) -> int | None:
        """How many more tasks like the last one fit into every layer; None where nothing suggests a limit."""
        return min((layer.forecast for layer in self.layers if layer.forecast is not None), default=None)

    @property
    def median_forecast(self) -> int | None:
        """How many fit into half of the layers."""
        by_urgency = sorted(self.layers, key=_urgency)
        return by_urgency[len(by_urgency) // 2].forecast

    def tightest(self, count: int = 3) -> list[LayerCapacity]:
        """The layers that fill first: by forecast, then by free directions."""
        return sorted(self.layers, key=_urgency)[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        layers = [{**asdict(layer), "added_by_task": list(layer.added_by_task)} for layer in self.layers]
        return {
            "tasks": self.tasks, "free_share": self.free_share, "forecast": self.forecast,
            "median_forecast": self.median_forecast, "layers": layers,
        }  # fmt: skip

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]], tasks: int) -> Capacity:
        """From the ``layers`` of [`to_dict`][]; ``ValueError`` where a row has other names."""
        names = {entry.name for entry in fields(LayerCapacity)}
        for row in rows:
            if set(row) != names:
                raise ValueError(f"of_rows: rows must have {', '.join(sorted(names))}, got {', '.join(sorted(row))}")
        layers = (LayerCapacity(**{**row, "added_by_task": tuple(row["added_by_task"])}) for row in rows)
        return cls(tuple(layers), tasks)

    @property
    def summary(self) -> str:
        """One line."""
        space = f"{self.free_share:.0%} of the space of {len(self)} layers is free"
        if self.forecast is None:
            return f"{space}; nothing suggests a limit yet"
        spent = [layer for layer in self.layers if layer.forecast == 0]
        missing = sum(layer.misses for layer in spent)
        for count, what in ((len(spent) - missing, "less than r directions left"),
                            (missing, "next to nothing of the gradient there")):  # fmt: skip
            if count:
                space += f", {count} {'layer has' if count == 1 else 'layers have'} {what}"
        return (
            f"{space}; room for {_tasks(self.forecast)} like the last in every layer, "
            f"{_count(self.median_forecast)} in half of them"
        )

    def by_depth(self) -> dict[tuple[str, int], Capacity]:
        """The layers of each tower and depth, as a capacity of their own."""
        blocks: dict[tuple[str, int], list[LayerCapacity]] = {}
        for layer in self.layers:
            blocks.setdefault((layer.tower, layer.depth), []).append(layer)
        return {place: Capacity(tuple(layers), self.tasks) for place, layers in blocks.items()}

    def rows(self) -> list[list[str]]:
        """Titles, then a row for each tower and depth: shares of directions, the fewest that are free in a layer."""
        rows = [["tower", "depth", "layers", "protected", "added", "free", "least free", "more tasks"]]
        for (tower, depth), block in self.by_depth().items():
            shares = (f"{_share(block.layers, name):.0%}" for name in ("protected", "added", "free"))
            least = min(layer.free for layer in block)
            rows.append([tower, str(depth), str(len(block)), *shares, str(least), _count(block.forecast)])
        return rows

    def __str__(self) -> str:
        """The summary, [`rows`][], and which layers fill first."""
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        when = f"after task {self.tasks}" if self.tasks else "before the first task"
        lines = [f"capacity {when}: {self.summary}", *table]
        if self.forecast is not None:
            names = (f"{x.name} ({x.free} of {x.in_features} free, {_count(x.forecast)})" for x in self.tightest())
            lines.append(f"fill first: {', '.join(names)}")
        return "\n".join(lines)


def _urgency(layer: LayerCapacity) -> tuple[float, int]:
    return (float("inf") if layer.forecast is None else layer.forecast, layer.free)


def _share(layers: Sequence[LayerCapacity], name: str) -> float:
    share: float = sum(getattr(layer, name) for layer in layers) / sum(layer.in_features for layer in layers)
    return share


def _count(number: int | None) -> str:
    return "no limit" if number is None else str(number)


def _tasks(number: int) -> str:
    return f"{number} more {'task' if number == 1 else 'tasks'}"


def layer_capacity(
    target: Target, width: int, protected: int, added_by_task: tuple[int, ...], r: int, share: float | None = None
) -> LayerCapacity:
    """The entry of a layer of ``width`` inputs that wants adapters of rank r."""
    free, added = width - protected, added_by_task[-1] if added_by_task else 0
    return LayerCapacity(
        name=target.name,
        tower=target.tower,
        depth=target.depth,
        in_features=width,
        protected=protected,
        free=free,
        added=added,
        forecast=forecast(free, r, added, share),
        added_by_task=added_by_task,
        share=share,
    )
