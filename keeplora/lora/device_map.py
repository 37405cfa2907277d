"""accelerate's ``device_map`` without offloading: hooks that bring a layer's inputs to where its weight is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["hand_over", "own_forward"]


def own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward that was set on the module itself, below accelerate's hook if it has one; None for its class's."""
    held = vars(module)
    return held.get("_old_forward") if "_hf_hook" in held else held.get("forward")


def hand_over(old: nn.Module, new: nn.Module) -> None:
    """Let ``new`` stand where ``old`` stood: on the device that accelerate's hook names, with its inputs.

    The parameters are there already, and stay the same objects.
    """
    hook = vars(old).get("_hf_hook")
    if hook is None:
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(old)
    add_hook_to_module(new, hook)
