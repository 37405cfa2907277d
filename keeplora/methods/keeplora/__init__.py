"""KeepLoRA and KeepLoRA++."""

from .certificate import LayerCertificate, RetentionCertificate
from .config import KeepLoraConfig
from .method import KeepLora

__all__ = ["KeepLora", "KeepLoraConfig", "LayerCertificate", "RetentionCertificate"]
