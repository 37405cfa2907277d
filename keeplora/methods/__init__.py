"""Continual-learning methods behind one protocol (:class:`~keeplora.methods.base.Method`)."""

from .base import LossFn, Method, State
from .baselines import FullFineTuning, LoraConfig, SequentialLora, ZeroShot
from .capacity import Capacity, LayerCapacity
from .certificate import LayerCertificate, RetentionCertificate
from .config import KeepLoraConfig
from .keeplora import KeepLora
from .peft import freeze_a, initialize, update_subspace
from .peft_state import SubspaceState
from .registry import METHODS, configure, create
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
    "SubspaceState",
    "ZeroShot",
    "configure",
    "create",
    "freeze_a",
    "initialize",
    "update_subspace",
]
