"""TensorBoard scalars of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from keeplora._files import told

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from keeplora.train.record import RunRecord

_EVERY = 10
"""Steps between two points of the loss curve."""


class Scalars:
    """Writes loss and accuracies of a run; without a folder it writes nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None

    def start_at(self, step: int) -> None:
        """Open the log after ``step`` steps; later points, left by an interrupted run, are dropped."""
        if self.folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only some runs want it

        with told(self.folder):
            self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """One point of the loss and learning-rate curves, every tenth step."""
        if self.writer is not None and step % _EVERY == 0:
            self._add({"train/loss": loss, "train/learning_rate": learning_rate}, step)

    def task(self, record: RunRecord, witness: float | None) -> None:
        """Accuracies in percent after a task, against the number of steps."""
        if self.writer is None:
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
        self._add(points, record.steps)

    def close(self) -> None:
        """Flush and close the log."""
        if self.writer is not None and self.folder is not None:
            with told(self.folder):
                self.writer.close()

    def _add(self, points: Mapping[str, float], step: int) -> None:
        if self.writer is not None and self.folder is not None:
            with told(self.folder):
                for name, value in points.items():
                    self.writer.add_scalar(name, value, step)


def open_scalars(folder: Path | None, wanted: bool) -> Scalars:
    """Scalars below a run's folder, or none."""
    return Scalars(folder / "tensorboard" if folder is not None and wanted else None)
