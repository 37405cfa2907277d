"""The configuration of a stock PEFT adapter, judged: is it plain LoRA, and are its numbers numbers?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

__all__ = ["check_plain_lora", "check_settings"]

_HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core",
    "loftq_config", "eva_config", "runtime_config", "qalora_group_size",
}  # fmt: skip
"""Fields of LoraConfig that leave ``y = x Wᵀ + c (x Aᵀ) Bᵀ`` what it is, or that are looked at elsewhere."""

_FAITHFUL = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base weights as they were."""


def check_plain_lora(function: str, config: Any) -> None:
    """Refuse a ``LoraConfig`` that is not ``W + c B A`` on unchanged base weights.

    Raises:
        ValueError: the field is named.
    """
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ValueError(f"{function}: the adapter must be LoRA, got {config.peft_type}")
    if config.use_dora:
        raise ValueError(
            f"{function}: use_dora must be False, got True: DoRA rescales every column of W + BA, the protected "
            "directions too. Use plain LoRA."
        )
    if getattr(config, "target_parameters", None):
        raise ValueError(
            f"{function}: target_parameters must be None, got {sorted(config.target_parameters)}: adapters of "
            "parameters, as experts have them, are not read. Adapt experts with keeplora.KeepLora, whose export_peft "
            "writes them."
        )
    init = config.init_lora_weights
    if not any(init is known if isinstance(known, bool) else init == known for known in _FAITHFUL):
        raise ValueError(
            f"{function}: init_lora_weights must leave the base weights unchanged, got {init!r}, which takes the "
            "adapter's start out of them. Use init_lora_weights=True; PEFT converts such adapters with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if config.bias != "none" or config.lora_bias:
        raise ValueError(
            f'{function}: bias must be "none" and lora_bias False, got {config.bias!r} and {config.lora_bias}: '
            "a trained bias moves every output, those of protected inputs too."
        )
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(config, field.name)
        if field.name not in _HARMLESS and value != default and value:
            raise ValueError(
                f"{function}: {field.name} must be left at its default, got {value!r}: what it changes about LoRA is "
                "not known to be confined."
            )


def check_settings(settings: Any) -> None:
    """Refuse numbers that are none, and patterns that would be matched for years."""
    values = settings if isinstance(settings, Mapping) else {}
    numbers: list[tuple[str, Any, Any]] = []
    for name, pattern, kinds in (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", int | float)):
        own = values.get(pattern) or {}
        if not isinstance(own, Mapping):
            raise ValueError(f"import_peft: {pattern} must be numbers by layer, got {own!r}")
        numbers += [(name, values[name], kinds)] if name in values else []
        numbers += [(pattern, value, kinds) for value in own.values()]
        for key in own:
            if len(key) > 1000 or len(re.findall(r"[*+{]", key)) > 4 or re.search(r"\)[*+{?]", key):
                raise ValueError(
                    f"import_peft: {pattern} must have simple patterns, got {key[:80]!r}. Write the layers' names."
                )
    for name, value, kinds in numbers:
        if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) < 1e30:
            raise ValueError(f"import_peft: {name} must be a finite number, got {value!r}")
