"""Continual-learning methods behind one protocol (``Method``)."""

from .capacity import Capacity, LayerCapacity
from .full import FullFineTuning
from .keeplora import KeepLora, KeepLoraConfig, LayerCertificate, RetentionCertificate
from .lora import LoraConfig, SequentialLora
from .lora_method import LoraMethod
from .method import LossFn, Method
from .reading import stored
from .registry import METHODS, Registered, configure, create, load
from .settings import AdapterConfig, ConfigError
from .state import State, StateError
from .zero_shot import ZeroShot

__all__ = [
    "METHODS",
    "AdapterConfig",
    "Capacity",
    "ConfigError",
    "FullFineTuning",
    "KeepLora",
    "KeepLoraConfig",
    "LayerCapacity",
    "LayerCertificate",
    "LoraConfig",
    "LoraMethod",
    "LossFn",
    "Method",
    "Registered",
    "RetentionCertificate",
    "SequentialLora",
    "State",
    "StateError",
    "ZeroShot",
    "configure",
    "create",
    "load",
    "stored",
]
