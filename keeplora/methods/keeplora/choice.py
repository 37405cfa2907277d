"""What is adapted, and what beside it is not frozen."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from keeplora.families import find_targets
from keeplora.lora import Target, select_targets

from .adapters import check_ranks
from .config import KeepLoraConfig

__all__ = ["chosen_targets", "warn_of_neighbours"]

_NAMED = 3  # parameters, in a warning


def chosen_targets(model: nn.Module, config: KeepLoraConfig, targets: Sequence[Target] | None) -> list[Target]:
    """What the configuration adapts of ``targets``, or of what the model's family has; refuses what cannot be."""
    if targets is None:
        targets = find_targets(model, config.towers)
    elif config.towers is not None:
        targets = [target for target in targets if target.tower in config.towers]
    chosen = select_targets(targets, config.target_modules)
    config.check_towers({target.tower for target in chosen})
    check_ranks(model, chosen, config.r)
    return chosen


def warn_of_neighbours(function: str, model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
    """Name parameters besides those the method trains that were left to train: nothing protects what they do.

    As a warning of the caller's caller.
    """
    own = {id(p) for p in trained}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        shown = ", ".join(others[:_NAMED]) + (" …" if len(others) > _NAMED else "")
        warnings.warn(
            f"{function}: {len(others)} parameters besides the adapters' have requires_grad, got {shown}. What is "
            "trained there is neither protected nor saved, and no certificate speaks of it: freeze them.",
            UserWarning,
            stacklevel=3,
        )
