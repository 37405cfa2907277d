"""A user's own tasks, as a settings file names them: image folders, `datasets`, LLaVA-style JSON."""

from __future__ import annotations

from keeplora.tasks.own.config import FAULTS, DataSettings, ModelSource, OwnTasks, TaskSource, parse_own
from keeplora.tasks.own.faults import Fault, Faults
from keeplora.tasks.workload import ItemWorkload

__all__ = [
    "FAULTS", "DataSettings", "Fault", "Faults", "ModelSource", "OwnTasks", "TaskSource", "open_workload", "parse_own",
]  # fmt: skip


def open_workload(own: OwnTasks, device: str = "cpu") -> ItemWorkload:
    """The tasks of a settings file, read and checked, with the pretrained model that is to learn them.

    Raises:
        ConfigError: the model cannot be loaded, or data is not as the settings allow. All faults are told at once.
    """
    if own.answers:
        from keeplora.tasks.own.answer_workload import AnswerWorkload  # needs transformers

        return AnswerWorkload(own, device)
    from keeplora.tasks.own.image_workload import ImageWorkload  # needs Pillow

    return ImageWorkload(own, device)
