"""What a method that adapts chosen weights refuses to be made of."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from keeplora.lora import Target, require_whole, target_shape
from keeplora.lora.quantised import quantised_layers

from .settings import ConfigError

if TYPE_CHECKING:
    from .lora_method import LoraMethod

__all__ = ["check_kept", "check_ranks", "refuse_peft"]

log = logging.getLogger("keeplora")


def refuse_peft(method: str, model: nn.Module) -> None:
    """Layers of a ``PeftModel`` hold an adapter: its A and B would be adapted like weights of the model."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith("peft.") and hasattr(module, "base_layer"):
            raise TypeError(
                f"{method}: model must not hold adapters of PEFT, got {type(module).__name__} at {path}. Pass "
                "merge_and_unload() of it, or use keeplora.initialize on the PeftModel."
            )


def check_ranks(model: nn.Module, targets: Sequence[Target], r: int, method: str) -> None:
    """Refuse a rank that is larger than a layer's width."""
    for target in targets:
        shape = target_shape(model, target)
        width = r if shape is None else shape[1]  # wrap says what is wrong with a missing one
        if r > width:
            raise ValueError(
                f"{method}: r must be at most the layer's width, got {r} for {width} [{target.name}]. Lower r."
            )


def check_kept(method: LoraMethod) -> None:
    """Refuse weights that cannot be merged into, of methods that do, and settings that ask for what is not there.

    Raises:
        TypeError: an adapted weight is quantised. ConfigError: ``merge`` or ``forward`` does not go with it.
    """
    name, adapted = type(method).__name__, {target.module for target in method.targets}
    require_whole(name, method.model, adapted, structure=True, shares=method.shared_out, quantised=method.keeps_beside)
    beside = not getattr(method.config, "merge", True)
    packed = sum(path in adapted for path, _ in quantised_layers(method.model))
    fault = ""
    if beside and not method.keeps_beside:
        fault = f"for {method.name!r}, which writes more into weights than updates"
    elif beside and method.shared_out:
        fault = "where FSDP2 shares weights out"
    elif beside and any(target.expert is not None for target in method.targets):
        fault = "for experts, whose layers add nothing beside their weights"
    if fault:
        raise ConfigError(f"{name}: merge must be True {fault}, got False. Leave it out.")
    if packed and getattr(method.config, "forward", "auto") == "merged":
        raise ConfigError(
            f'{name}: forward must be "auto" or "factored" where weights are quantised, got "merged". Leave it out.'
        )
    if packed:
        log.info(
            "%d of %d adapted layers are quantised: what they learn is kept beside their weights",
            packed, len(adapted),
        )  # fmt: skip
