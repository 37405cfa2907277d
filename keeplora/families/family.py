"""What a family of models tells about its members; adding one is one file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from keeplora.lora import Target, TokenMask

__all__ = ["Family"]


class Family(Protocol):
    """A module of this package that knows one library's models."""

    def owns(self, model: nn.Module) -> bool:
        """Whether ``model`` itself, not something inside it, belongs to the family."""

    def find_targets(self, model: nn.Module, towers: Sequence[str] | None = None) -> list[Target]:
        """What can be adapted in ``towers``, or in those the family adapts by default."""

    def token_mask(self, model: nn.Module) -> AbstractContextManager[TokenMask]:
        """Which tokens count as features, of whatever the model is given while the context is open."""
