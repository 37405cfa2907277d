"""What PEFT starts an adapter with: asked of its own code, on a layer that stands in for the weight."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

from torch import Tensor, nn

__all__ = ["LAYER", "Prepare", "peft_factors", "require_peft"]

Prepare = Callable[[nn.Module, Any], None]
"""``prepare(model, config)``: PEFT's own preparation of a model whose one layer, ``LAYER``, has the weight."""

LAYER, ADAPTER = "layer", "default"
OLDEST = (0, 21)
"""The first PEFT with all of the starts."""


def require_peft(method: str) -> None:
    """Load PEFT, which takes seconds, and refuse to go on without one that has the starts.

    Raises:
        ImportError: PEFT is not installed, or too old.
    """
    try:
        version = metadata.version("peft")
    except metadata.PackageNotFoundError:
        version = "none"
    if version == "none" or tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"{method}: peft must be installed, {'.'.join(map(str, OLDEST))} or newer, got {version}. "
            "Run pip install 'keeplora[peft]'.",
            name="peft",
        )
    import_module("peft")


def peft_factors(weight: Tensor, prepare: Prepare | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """A ``[r, in]`` and B ``[out, r]`` that PEFT starts an adapter of ``weight [out, in]`` with, float32.

    The weight itself is left alone. Random numbers are drawn from the global generators.

    Args:
        prepare: Called before the adapter is made.
        settings: Of ``peft.LoraConfig``.
    """
    from peft import LoraConfig, inject_adapter_in_model

    out, width = weight.shape
    layer = nn.Linear(width, out, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().float().clone(), requires_grad=False)  # PEFT writes into it
    model = nn.ModuleDict({LAYER: layer})
    config = LoraConfig(target_modules=[LAYER], **settings)
    if prepare is not None:
        prepare(model, config)
    inject_adapter_in_model(config, model, ADAPTER)
    made: Any = model[LAYER]
    return made.lora_A[ADAPTER].weight.detach(), made.lora_B[ADAPTER].weight.detach()
