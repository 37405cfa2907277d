"""LoRA layers: the adapters' homes in a model, the list of targets, and what one pass over data tells about them."""

from .adapter import LoraAdapter, LoraHost
from .attention import LoraAttention, attend
from .borrowed import BorrowedLinear
from .features import FeatureStatistic, TokenMask, feature_statistics
from .gradients import mean_gradients, sketch_widths
from .linear import LoraLinear
from .optimizer import Confinement, ProjectedAdamW, confine
from .passes import first_batches
from .prepare import merge_ahead
from .targets import Target, attention_targets, depth_positions, linear_targets, select_targets
from .wrap import LoraSlot, register_host, unwrap, wrap

__all__ = [
    "BorrowedLinear",
    "Confinement",
    "FeatureStatistic",
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
    "depth_positions",
    "feature_statistics",
    "first_batches",
    "linear_targets",
    "mean_gradients",
    "merge_ahead",
    "register_host",
    "select_targets",
    "sketch_widths",
    "unwrap",
    "wrap",
]
