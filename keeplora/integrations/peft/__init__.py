"""KeepLoRA on a stock ``PeftModel``: two calls around one's own training."""

from .keep import keep_adapter
from .state import SubspaceState
from .subspace import freeze_a, initialize, update_subspace

__all__ = ["SubspaceState", "freeze_a", "initialize", "keep_adapter", "update_subspace"]
