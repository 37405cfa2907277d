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
)

__all__ = [
    "Capacity",
    "KeepLora",
    "KeepLoraConfig",
    "LayerCapacity",
    "LayerCertificate",
    "RetentionCertificate",
    "StateError",
    "__version__",
]
