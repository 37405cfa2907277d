"""KeepLoRA++ for PyTorch: teach a vision-language model new tasks without losing what it knows."""

from keeplora._version import __version__
from keeplora.methods import (
    KeepLora,
    KeepLoraConfig,
    LayerCapacity,
    LayerCertificate,
    RetentionCertificate,
    StateError,
)

__all__ = [
    "KeepLora",
    "KeepLoraConfig",
    "LayerCapacity",
    "LayerCertificate",
    "RetentionCertificate",
    "StateError",
    "__version__",
]
