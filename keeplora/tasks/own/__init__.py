"""A user's own tasks, as a settings file names them: image folders, `datasets`, LLaVA-style JSON."""

from __future__ import annotations

from keeplora.tasks.own.config import FAULTS, DataSettings, ModelSource, OwnTasks, TaskSource, parse_own
from keeplora.tasks.own.faults import Fault, Faults

__all__ = ["FAULTS", "DataSettings", "Fault", "Faults", "ModelSource", "OwnTasks", "TaskSource", "parse_own"]
