"""Arguments that every call around a task takes: what cannot be used is refused by name, before anything changes."""

from __future__ import annotations

from collections.abc import Sequence

from keeplora.lora import Target

__all__ = ["require_data", "require_function", "require_loader", "require_targets"]

_REMEDIES = {
    "loss_fn": "It returns the mean loss of one batch; the loader comes before it.",
    "batch_size": "Leave it out where a batch's first dimension counts its samples.",
    "token_mask": "Leave it out to count all tokens that the model's family does not call padding.",
}
_TAKES = {"loss_fn": "(model, batch)", "batch_size": "a batch", "token_mask": "(slot, x)"}


def require_loader(function: str, loader: object) -> None:
    """Refuse what cannot be iterated, and a text, whose batches would be letters."""
    if isinstance(loader, str) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise TypeError(
            f"{function}: loader must yield batches, got {type(loader).__name__}. Pass a DataLoader or a list of "
            "batches."
        )


def require_data(function: str, loader: object, loss_fn: object, *, batch_size: object = None) -> None:
    """Refuse what is no data, and what cannot run the model on it."""
    require_function(function, "loss_fn", loss_fn, optional=False)  # first: it is easily swapped with the loader
    require_loader(function, loader)
    require_function(function, "batch_size", batch_size)


def require_function(function: str, name: str, value: object, *, optional: bool = True) -> None:
    """Refuse a ``loss_fn``, ``batch_size`` or ``token_mask`` that cannot be called."""
    if callable(value) or (value is None and optional):
        return
    got = repr(value) if isinstance(value, int | float | str) else type(value).__name__
    raise TypeError(f"{function}: {name} must be a function of {_TAKES[name]}, got {got}. {_REMEDIES[name]}")


def require_targets(function: str, targets: object) -> None:
    """Refuse names, and whatever else is no list of Targets; None are those that are found."""
    if targets is None:
        return
    given = [] if isinstance(targets, str) or not isinstance(targets, Sequence) else list(targets)
    if not given or not all(isinstance(target, Target) for target in given):
        raise TypeError(
            f"{function}: targets must be a list of at least one Target, got {targets!r}. Take some of "
            "keeplora.find_targets(model), or leave it out; names go into target_modules."
        )
