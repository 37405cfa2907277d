"""Continual-learning methods behind one protocol (:class:`~keeplora.methods.base.Method`)."""

from .base import LossFn, Method, State
from .baselines import FullFineTuning, LoraConfig, SequentialLora, ZeroShot
from .capacity import Capacity, LayerCapacity
from .certificate import LayerCertificate, RetentionCertificate
from .config import KeepLoraConfig
from .keeplora import KeepLora
from .registry import METHODS, create
from .state import StateError

__all__ = [
    "METHODS",
    "Capacity",
    "FullFineTuning",
    "KeepLora",
    "KeepLoraConfig",
    "LayerCapacity",
    "LayerCertificate",
    "LoraConfig",
    "LossFn",
    "Method",
    "RetentionCertificate",
    "SequentialLora",
    "State",
    "StateError",
    "ZeroShot",
    "create",
]
