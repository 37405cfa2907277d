"""Model families: each turns a model into one flat list of targets. Optional libraries are imported inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from keeplora.lora import Target, TokenMask, linear_targets

from . import open_clip

__all__ = ["find_targets", "token_mask"]


def find_targets(model: nn.Module) -> list[Target]:
    """All weights of ``model`` that can be adapted, with tower and depth where its family is known.

    A known model may stand inside another module (DistributedDataParallel, a wrapper of one's own); what stands
    beside it there is not adapted.
    """
    path, clip = _inner_clip(model)
    if clip is None:
        return linear_targets(model)
    prefix = f"{path}." if path else ""
    return [replace(t, name=prefix + t.name, module=prefix + t.module) for t in open_clip.find_targets(clip)]


@contextmanager
def token_mask(model: nn.Module) -> Iterator[TokenMask | None]:
    """Which tokens of the model's inputs count as features; None where the family is unknown: all do."""
    _, clip = _inner_clip(model)
    if clip is None:
        yield None
        return
    with open_clip.token_mask(clip) as mask:
        yield mask


def _inner_clip(model: nn.Module) -> tuple[str, nn.Module | None]:
    """The outermost open_clip model inside ``model`` and its path."""
    for path, module in model.named_modules():
        if open_clip.is_open_clip(module):
            return path, module
    return "", None
