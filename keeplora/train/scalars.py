"""The figures of a run over its steps, for whatever tracks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keeplora.train.config import RunConfig
from keeplora.train.trackers import MlflowTracker, TensorBoardTracker, Tracker, WandbTracker

if TYPE_CHECKING:
    from keeplora.train.record import RunRecord

_EVERY = 10
"""Steps between two points of the loss curve."""


class Scalars:
    """Gives loss and accuracies of a run to its trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = trackers

    def start_at(self, step: int) -> None:
        """Open the trackers after ``step`` steps."""
        for tracker in self.trackers:
            tracker.open(step)

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """One point of the loss and learning-rate curves, every tenth step."""
        if self.trackers and step % _EVERY == 0:
            self._log({"train/loss": loss, "train/learning_rate": learning_rate}, step)

    def task(self, record: RunRecord, witness: float | None) -> None:
        """Accuracies in percent after a task, against the number of steps."""
        if not self.trackers:
            return
        row = record.accuracy[-1]
        points = {f"accuracy/{name}": value for name, value in zip(record.tasks, row, strict=True)}
        points["mean/accuracy"] = float(np.mean(row))
        if witness is not None:
            points["mean/witness"] = witness
        points = {name: 100 * value for name, value in points.items()}
        certificate = record.certificates[-1]
        for name in ("leak", "orthogonality"):
            if certificate is not None and certificate[name] is not None:
                points[f"certificate/{name}"] = certificate[name]
        self._log(points, record.steps)

    def close(self) -> None:
        """Flush and close the trackers."""
        for tracker in self.trackers:
            tracker.close()

    def _log(self, points: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(points, step)


def open_scalars(config: RunConfig, label: str, seed: int, folder: Path | None) -> Scalars:
    """The trackers of a run that has a folder; without one there are none."""
    if folder is None:
        return Scalars([])
    entry = config.of(label)
    name = f"{config.benchmark} {label} seed {seed}"
    settings = {
        "benchmark": config.benchmark, "label": label, "seed": seed, "learning_rate": entry.learning_rate,
        **entry.settings,
    }  # fmt: skip
    kinds: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]]
    kinds = {"wandb": WandbTracker, "mlflow": MlflowTracker}
    made: list[Tracker] = [TensorBoardTracker(folder / "tensorboard")] if config.tensorboard else []
    return Scalars([*made, *(kinds[kind](folder, name, settings) for kind in config.trackers)])
