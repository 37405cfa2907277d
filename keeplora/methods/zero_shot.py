"""Zero-shot: the pretrained model, never trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .method import LossFn, Method, check_method
from .state import State

__all__ = ["NoConfig", "ZeroShot"]


@dataclass(frozen=True)
class NoConfig:
    """No settings."""


class ZeroShot(Method):
    """The pretrained model, never trained."""

    name: ClassVar[str] = "zero-shot"
    trains: ClassVar[bool] = False

    def __init__(self, model: nn.Module, config: NoConfig | None = None):
        self.model = model
        self.config = config or NoConfig()

    def before_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        """Nothing to prepare."""

    def trainable_parameters(self) -> list[nn.Parameter]:
        return []

    def after_task(self, loader: Iterable[Any], loss_fn: LossFn | None = None) -> None:
        """Nothing to close."""

    def state(self) -> State:
        return State({}, {"method": self.name})

    def load_state(self, state: State) -> None:
        check_method(self, state)
