"""Where the figures of a run go while it runs: TensorBoard, Weights & Biases, MLflow, each through its own package."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from keeplora._files import told, write_json
from keeplora.methods.settings import ConfigError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["PACKAGES", "TRACKERS", "MlflowTracker", "Tracker", "WandbTracker"]

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
"""What each needs installed: the module, and the smallest package that has it."""
TRACKERS = tuple(PACKAGES)
PROJECT = "keeplora"
_IDENTITY = "tracked.json"


@contextmanager
def _refusing(kind: str, where: str) -> Iterator[None]:
    """One sentence for whatever a tracker says when a run is begun: nothing has been trained yet."""
    try:
        yield
    except Exception as error:  # theirs are of many kinds
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"run: {kind} must take the run, got {type(error).__name__}: {reason}. See {where}, or take {kind!r} out "
            "of trackers"
        ) from error


class Tracker(Protocol):
    """Takes named figures at a step, once it is opened after some steps."""

    def open(self, steps: int) -> None: ...

    def log(self, points: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files in a folder. After an interruption later points are dropped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None

    def open(self, steps: int) -> None:
        """Open the log after ``steps`` steps."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only some runs want it

        with told(self.folder):
            self.writer = SummaryWriter(str(self.folder), purge_step=steps + 1)

    def log(self, points: Mapping[str, float], step: int) -> None:
        """Add the points."""
        if self.writer is not None:
            with told(self.folder):
                for name, value in points.items():
                    self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        if self.writer is not None:
            with told(self.folder):
                self.writer.close()


class WandbTracker:
    """A run of Weights & Biases in the project ``keeplora``, or in what ``WANDB_PROJECT`` says.

    The x-axis is the figure ``step``. A run that was interrupted goes on in the same one; points of the part that is
    done again stand there twice, as W&B takes none back. ``WANDB_MODE=offline`` keeps everything in the run's folder.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.folder, self.name, self.settings = folder, name, settings
        self.run: Any = None

    def open(self, steps: int) -> None:
        """Begin the run, or go on with it."""
        import os

        import wandb  # optional

        known = _remembered(self.folder, "wandb") if steps else None
        with _refusing("wandb", "WANDB_MODE and WANDB_API_KEY"):
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT), name=self.name, config=dict(self.settings),
                dir=str(self.folder), id=known, resume="allow" if known else None, reinit="finish_previous",
            )  # fmt: skip
            self.run.define_metric("*", step_metric="step")
        _remember(self.folder, "wandb", self.run.id)

    def log(self, points: Mapping[str, float], step: int) -> None:
        """Add the points."""
        if self.run is not None:
            self.run.log({**points, "step": step})

    def close(self) -> None:
        """Finish the run."""
        if self.run is not None:
            self.run.finish()


class MlflowTracker:
    """A run of MLflow in the experiment ``keeplora``, or in what ``MLFLOW_EXPERIMENT_NAME`` says.

    Where ``MLFLOW_TRACKING_URI`` says. A run that was interrupted goes on in the same one; of a step that is done again
    MLflow keeps both points.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.folder, self.name, self.settings = folder, name, settings
        self.client: Any = None
        self.run = ""

    def open(self, steps: int) -> None:
        """Begin the run, or go on with it."""
        from mlflow import MlflowClient  # optional

        with _refusing("mlflow", "MLFLOW_TRACKING_URI; of file stores also MLFLOW_ALLOW_FILE_STORE=true"):
            self._begin(MlflowClient(), steps)

    def _begin(self, client: Any, steps: int) -> None:
        import os

        self.client = client
        known = _remembered(self.folder, "mlflow") if steps else None
        if known:
            self.run = known
            self.client.update_run(known, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found is not None else self.client.create_experiment(experiment)
        self.run = self.client.create_run(number, run_name=self.name).info.run_id
        for name, value in self.settings.items():
            self.client.log_param(self.run, name, str(value)[:500])
        _remember(self.folder, "mlflow", self.run)

    def log(self, points: Mapping[str, float], step: int) -> None:
        """Add the points; MLflow allows fewer signs in names, others become ``_``."""
        if self.client is not None:
            for name, value in points.items():
                self.client.log_metric(self.run, re.sub(r"[^\w\-. /]", "_", name), value, step=step)

    def close(self) -> None:
        """End the run."""
        if self.client is not None:
            self.client.set_terminated(self.run)


def _remembered(folder: Path, kind: str) -> str | None:
    """The run's name at the tracker, where an earlier part of it has written one."""
    file = folder / _IDENTITY
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return known.get(kind)


def _remember(folder: Path, kind: str, name: str) -> None:
    file = folder / _IDENTITY
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    write_json(file, {**known, kind: name})
