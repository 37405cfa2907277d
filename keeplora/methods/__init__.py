"""Continual-learning methods behind one protocol (:class:`~keeplora.methods.method.Method`)."""

from .capacity import Capacity, LayerCapacity
from .full import FullFineTuning
from .keeplora import KeepLora, KeepLoraConfig, LayerCertificate, RetentionCertificate
from .lora import LoraConfig, SequentialLora
from .method import LossFn, Method
from .registry import METHODS, configure, create
from .state import State, StateError
from .zero_shot import ZeroShot

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
    "configure",
    "create",
]
