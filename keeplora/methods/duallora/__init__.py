"""DualLoRA: an orthogonal and a residual adapter."""

from .method import DualLora, DualLoraConfig

__all__ = ["DualLora", "DualLoraConfig"]
