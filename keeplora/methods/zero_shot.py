"""Zero-shot: the pretrained model, never trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .method import LossFn, Method
from .settings import Settings
from .state import State

__all__ = ["NoConfig", "ZeroShot"]


@dataclass(frozen=True)
class NoConfig(Settings):
    """No settings."""


class ZeroShot(Method):
    """The pretrained model, never trained."""

    name: ClassVar[str] = "zero-shot"
    config_type: ClassVar[type] = NoConfig
    trains: ClassVar[bool] = False

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        """Nothing to prepare."""

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        """Nothing to take in."""

    def drop_task(self) -> None:
        """Nothing to undo."""

    def named_trained(self) -> list[tuple[str, nn.Parameter]]:
        return []

    def _warn_of_neighbours(self, function: str) -> None:
        """The model is as the user left it: nothing is trained, and nothing is promised."""

    def weights_state(self) -> State:
        return State()

    def recall_weights(self, state: State) -> None:
        """There are none."""

    def set_weights(self, weights: None, *, open_task: bool) -> None:
        """There are none."""
