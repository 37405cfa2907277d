"""What the calls on a PeftModel begin with, and refuse before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from keeplora.lora import Target
from keeplora.math.finite import first_not_finite
from keeplora.methods.keeplora.config import KeepLoraConfig

from .adapter import PeftAdapter, PeftLayer, find_adapter, trainable_neighbours
from .fingerprints import fingerprint, hashes
from .state import SubspaceState

__all__ = ["begin", "check_finite", "refuse_neighbours", "require_fresh", "require_kinds", "with_stock_settings"]


def begin(
    function: str,
    model: Any,
    state: SubspaceState | None,
    config: KeepLoraConfig | None,
    adapter_name: str | None,
    targets: Sequence[Target] | None,
) -> tuple[SubspaceState, PeftAdapter]:
    """The state, a new one of the adapter's layers if None, and the adapter on weights that are the state's."""
    if state is None:
        adapter = find_adapter(function, model, adapter_name, targets=targets)
        state = SubspaceState(config or KeepLoraConfig(), tuple(layer.target for layer in adapter.layers))
        state.config.check_towers({target.tower for target in state.targets})
        state.pretrained = state.current = fingerprint(adapter.layers)
        state.base_hashes = hashes(adapter.layers)
        return state, adapter
    if state.open_adapter is not None:
        raise RuntimeError(
            f"{function}: the previous task must be closed first, got adapter {state.open_adapter!r} open. "
            "Call update_subspace(model, loader, state)."
        )
    if config is not None and config != state.config:
        raise ValueError(f"{function}: config must be the state's or None, got another. Make a new state.")
    adapter = state.adapter_of(function, model, adapter_name)
    state.require_base(function, adapter.layers)
    return state, adapter


def require_kinds(function: str, state: object, config: object) -> None:
    """Refuse arguments in each other's place."""
    if state is not None and not isinstance(state, SubspaceState):
        raise TypeError(
            f"{function}: state must be a SubspaceState or None, got {type(state).__name__}. "
            "Settings of a new state are given as config=."
        )
    if config is not None and not isinstance(config, KeepLoraConfig):
        raise TypeError(f"{function}: config must be a KeepLoraConfig or None, got {type(config).__name__}.")


def with_stock_settings(config: KeepLoraConfig, adapter: PeftAdapter) -> KeepLoraConfig:
    """The settings with those of ``LoraConfig``; refuses what stock layers cannot do, or would be said twice."""
    default, lora = KeepLoraConfig(), adapter.config
    stock = {"r": lora.r, "alpha": float(lora.lora_alpha), "rslora": lora.use_rslora, "dropout": lora.lora_dropout}
    for name, value in stock.items():
        if getattr(config, name) not in (getattr(default, name), value):
            raise ValueError(
                f"initialize: config.{name} must be left alone, got {getattr(config, name)!r}: "
                f"the adapter's LoraConfig says {value!r}."
            )
    for name in ("target_modules", "init_b", "forward", "train_a", "feature_source", "exact_weights", "merge"):
        if getattr(config, name) != getattr(default, name):
            raise ValueError(
                f"initialize: config.{name} must be {getattr(default, name)!r} with PEFT's layers, got "
                f"{getattr(config, name)!r}. Use LoraConfig where it has the setting, else keeplora.KeepLora."
            )
    if not config.frozen_buffers:
        raise ValueError(
            "initialize: config.frozen_buffers must be True with PEFT's layers, got False. Name the modules whose "
            "buffers may move in also_train, or use keeplora.KeepLora."
        )
    return replace(config, **stock)


def require_fresh(adapter: PeftAdapter) -> None:
    """Refuse an adapter that has learned something, which a new start would lose."""
    trained = [layer.name for layer in adapter.layers if bool(layer.b.detach().count_nonzero())]
    if trained:
        raise RuntimeError(
            f"initialize: the adapter must be fresh (B zero), got {len(trained)} layers with B (first: {trained[0]}), "
            "which would be lost. Close its task with update_subspace, or add another adapter; LoraConfig needs "
            "init_lora_weights=True."
        )


def refuse_neighbours(function: str, adapter: PeftAdapter, kept: Sequence[str], also_train: Sequence[str]) -> None:
    """Refuse trainable parameters beside the adapter that nobody has named."""
    others = trainable_neighbours(adapter, kept, also_train)
    if not others:
        return
    saved = adapter.config.modules_to_save
    raise ValueError(
        f"{function}: only the adapter may be trained, got {len(others)} parameters beside it (first: {others[0]})"
        + (f"; LoraConfig has modules_to_save={sorted(saved)}" if saved else "")
        + ". Freeze them, or name their modules in initialize(..., also_train=[...]): nothing protects what they do."
    )


def check_finite(layers: Sequence[PeftLayer]) -> None:
    """Refuse to merge what is no number any more."""
    factors = [(layer.name, factor) for layer in layers for factor in (layer.a, layer.b)]
    wrong = first_not_finite([factor for _, factor in factors])
    if wrong is not None:
        raise ValueError(
            f"update_subspace: trained adapters must be finite, got NaN or Inf [{factors[wrong][0]}]. "
            "Go back to the last saved adapter and lower the learning rate."
        )
