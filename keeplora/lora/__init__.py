"""LoRA layers: the adapters' homes in a model, the list of targets, and optimizers that keep adapters confined."""

from .adapter import LoraAdapter
from .attention import LoraAttention, attend
from .borrowed import BorrowedLinear
from .engines import require_module, require_whole
from .experts import LoraExperts
from .forward import own_linear
from .host import LoraHost
from .linear import LoraLinear
from .merge_ahead import merge_ahead
from .mixture import ExpertLayout, expert_layout
from .optimizer import Confinement, ProjectedAdamW, confine
from .slot import LoraSlot, TokenMask, merge_adapters
from .targets import (
    Target,
    attention_targets,
    depth_factor,
    depth_positions,
    expert_targets,
    linear_targets,
    select_targets,
    target_shape,
)
from .wrap import register_host, unwrap, wrap

__all__ = [
    "BorrowedLinear",
    "Confinement",
    "ExpertLayout",
    "LoraAdapter",
    "LoraAttention",
    "LoraExperts",
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
    "expert_layout",
    "expert_targets",
    "linear_targets",
    "merge_adapters",
    "merge_ahead",
    "own_linear",
    "register_host",
    "require_module",
    "require_whole",
    "select_targets",
    "target_shape",
    "unwrap",
    "wrap",
]
