"""KeepLoRA++ with classifiers on image features."""

from .method import KeepLoraCls, KeepLoraClsConfig

__all__ = ["KeepLoraCls", "KeepLoraClsConfig"]
