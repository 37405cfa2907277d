"""LoRA layers: the adapters' homes in a model, the list of targets, and optimizers that keep adapters confined."""

from .adapter import LoraAdapter
from .attention import LoraAttention, attend
from .borrowed import BorrowedLinear
from .host import LoraHost
from .linear import LoraLinear
from .merge_ahead import merge_ahead
from .optimizer import Confinement, ProjectedAdamW, confine
from .targets import Target, attention_targets, depth_factor, depth_positions, linear_targets, select_targets
from .wrap import LoraSlot, TokenMask, register_host, unwrap, wrap

__all__ = [
    "BorrowedLinear",
    "Confinement",
    "LoraAdapter",
    "LoraAttention",
    "LoraHost",
    "LoraLinear",
    "LoraSlot",
    "ProjectedAdamW",
    "Target",
    "TokenMask",
    "attend",
    "attention_targets",
    "confine",
    "depth_factor",
    "depth_positions",
    "linear_targets",
    "merge_ahead",
    "register_host",
    "select_targets",
    "unwrap",
    "wrap",
]
