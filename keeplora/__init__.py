"""KeepLoRA++ for PyTorch: teach a vision-language model new tasks without losing what it knows."""

from keeplora._version import __version__
from keeplora.integrations.peft import SubspaceState, freeze_a, initialize, update_subspace
from keeplora.methods import (
    Capacity,
    KeepLora,
    KeepLoraConfig,
    LayerCapacity,
    LayerCertificate,
    RetentionCertificate,
    StateError,
)

__all__ = [
    "Capacity",
    "KeepLora",
    "KeepLoraConfig",
    "LayerCapacity",
    "LayerCertificate",
    "RetentionCertificate",
    "StateError",
    "SubspaceState",
    "__version__",
    "freeze_a",
    "initialize",
    "update_subspace",
]
