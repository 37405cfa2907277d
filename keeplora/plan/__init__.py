"""What a model will take before any of its weights are loaded: bytes and seconds of every phase, from its config."""

from .memory import Setting, memory
from .plan import Plan, plan
from .shapes import MODELS, Shapes, shapes_of
from .wire import wire_bytes

__all__ = ["MODELS", "Plan", "Setting", "Shapes", "memory", "plan", "shapes_of", "wire_bytes"]
