"""What tells the weights of a ``PeftModel``'s base again: hashes that no repacking changes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from keeplora.lora import Target
from keeplora.lora.four_bit import dequantize_four_bit, is_four_bit, was_repacked
from keeplora.math.digest import digest
from keeplora.methods.base_weights import Hashes, hash_weights
from keeplora.methods.buffers import model_buffers

from .adapter import PeftAdapter, PeftLayer

__all__ = ["fingerprint", "frozen_fingerprint", "hashes", "named_weights", "of_repacking"]


def named_weights(targets: Sequence[Target], weights: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{target.name}.weight": weight.detach() for target, weight in zip(targets, weights, strict=True)}


def hashes(layers: Sequence[PeftLayer]) -> Hashes:
    """Hashes of the layers' base weights, by which keeplora knows them again in other dtypes, too."""
    return hash_weights(
        named_weights([layer.target for layer in layers], [layer.comparable_weight() for layer in layers])
    )


def of_repacking(layers: Sequence[PeftLayer]) -> str:
    if not any(was_repacked(layer.base.weight) for layer in layers):
        return ""
    return (
        " bitsandbytes has repacked 4-bit weights in eval() for this CPU, and state_dict(), which PEFT calls to save "
        "and load adapters, changes such weights. Load base and adapter anew, and call restore before evaluating them."
    )


def fingerprint(layers: Sequence[PeftLayer]) -> str:
    """A hash of the layers' base weights, the same whether bitsandbytes has repacked them or not."""
    shapes = (f"{layer.name} {layer.base.out_features} {layer.base.in_features}" for layer in layers)
    return digest(zip(shapes, (layer.comparable_weight() for layer in layers), strict=True))


def frozen_fingerprint(adapter: PeftAdapter, also_train: Collection[str]) -> str:
    """A hash of all other weights and buffers of the base model, but those of modules trained beside the adapter."""
    own = {id(layer.base.weight) for layer in adapter.layers}
    parameters = {
        name: dequantize_four_bit(parameter, rounded_scales=True) if is_four_bit(parameter) else parameter
        for name, parameter in adapter.base.named_parameters()
        if id(parameter) not in own and not any(part.startswith("lora_") for part in name.split("."))
    }
    held = parameters | model_buffers(adapter.base)
    return digest(
        (name.replace(".base_layer.", "."), tensor)
        for name, tensor in sorted(held.items())
        if not any(f".{part}." in f".{name}." for part in (*also_train, "modules_to_save"))
    )
