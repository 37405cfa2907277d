"""The pretrained model that an adapter belongs to, as PEFT's ``AutoPeftModel`` classes find it again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import nn

from keeplora._messages import warn

from .shares import class_before

__all__ = ["BaseModel"]


@dataclass(frozen=True)
class BaseModel:
    """What is known of a pretrained model, in the words of PEFT's configuration.

    Attributes:
        name: Its id on the Hub or its local folder (absolute); None where it is not known.
        revision: The commit of the Hub that it was loaded from.
        task_type: ``CAUSAL_LM`` or ``SEQ_2_SEQ_LM`` where transformers' auto class of that name makes this model.
        auto_mapping: Of other models: class and module, from which ``AutoPeftModel`` loads it.
    """

    name: str | None = None
    revision: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, str] | None = None

    @classmethod
    def of(
        cls, model: nn.Module, *, name: str | None = None, revision: str | None = None, task_type: str | None = None
    ) -> BaseModel:
        """What ``model`` tells of itself, but for what is given.

        Raises:
            ValueError: ``task_type`` is none of PEFT's.

        Warns:
            UserWarning: a model of transformers that was loaded from nowhere, with no ``name`` given.
        """
        if task_type is not None:
            from peft import TaskType

            if task_type not in (known := [kind.value for kind in TaskType]):
                raise ValueError(f"export_peft: task_type must be None or one of {', '.join(known)}, got {task_type!r}")
        config: Any = getattr(model, "config", None)
        own = getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None) or None
        if name is None and own is None and hasattr(model, "name_or_path"):
            warn(
                "export_peft: the base model must have a name to be found again, got a model that was loaded from "
                "nowhere: AutoPeftModel will not find it. Pass base_model=, its folder or its id on the Hub."
            )
        chosen = name or own
        commit = getattr(config, "_commit_hash", None) if chosen == own else None
        kind = task_type or _task_type(model)
        made = class_before(model)
        loads = callable(getattr(made, "from_pretrained", None))
        mapping = {"base_model_class": made.__name__, "parent_library": made.__module__}
        local = chosen is not None and os.path.isdir(chosen)
        return cls(
            os.path.abspath(chosen) if local and chosen else chosen,
            revision or (None if local else commit),
            kind,
            mapping if kind is None and loads else None,
        )

    @property
    def on_hub(self) -> bool:
        """Whether the name is an id on the Hub, and no folder of this machine."""
        from huggingface_hub import utils

        hub: Any = utils
        if self.name is None or os.path.exists(self.name):
            return False
        try:
            hub.validate_repo_id(self.name)
        except hub.HFValidationError:
            return False
        return True


def _task_type(model: nn.Module) -> str | None:
    """PEFT's task type whose auto class makes exactly this kind of model; None for vision-language models and others.

    Classifiers are left to ``auto_mapping``: PEFT would train their heads beside the adapter.
    """
    made = class_before(model)
    if not made.__module__.startswith("transformers."):
        return None
    from transformers.models.auto import modeling_auto

    mappings: Any = vars(modeling_auto)
    config = type(getattr(model, "config", None))

    def makes(mapping: str) -> bool:
        """Whether the auto class with this mapping makes this kind of model of this configuration."""
        return mapping in mappings and mappings[mapping].get(config, None) is made

    if makes("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"):
        return None
    kinds = {"CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING", "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"}
    return next((kind for kind, mapping in kinds.items() if makes(mapping)), None)
