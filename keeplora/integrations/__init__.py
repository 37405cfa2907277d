"""Model families: each turns a model into one flat list of targets. Optional libraries are imported inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from keeplora.lora import Target, TokenMask, linear_targets

from . import open_clip

__all__ = ["find_targets", "token_mask"]


def find_targets(model: nn.Module) -> list[Target]:
    """All weights of ``model`` that can be adapted, with tower and depth where its family is known."""
    return open_clip.find_targets(model) if open_clip.is_open_clip(model) else linear_targets(model)


@contextmanager
def token_mask(model: nn.Module) -> Iterator[TokenMask | None]:
    """Which tokens of the model's inputs count as features; None where the family is unknown: all do."""
    if not open_clip.is_open_clip(model):
        yield None
        return
    with open_clip.token_mask(model) as mask:
        yield mask
