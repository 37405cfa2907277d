"""KeepLoRA++ for PyTorch: teach a vision-language model new tasks without losing what it knows."""

from keeplora._version import __version__
from keeplora.methods import (
    Capacity,
    KeepLora,
    KeepLoraConfig,
    LayerCapacity,
    LayerCertificate,
    RetentionCertificate,
    StateError,
    SubspaceState,
    freeze_a,
    initialize,
    update_subspace,
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
