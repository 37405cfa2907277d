"""Which parameters of a model take gradients."""

from __future__ import annotations

from torch import nn

__all__ = ["flags", "freeze"]


def flags(model: nn.Module) -> dict[nn.Parameter, bool]:
    """``requires_grad`` of every parameter."""
    return {parameter: parameter.requires_grad for parameter in model.parameters()}


def freeze(model: nn.Module) -> None:
    """Switch every parameter's gradient off."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
