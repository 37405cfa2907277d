"""Where others own the model or the loop: PEFT's models, Hugging Face's Trainer. Optional packages load when used."""

from typing import TYPE_CHECKING

from keeplora._lazy import Lazy as _Lazy
from keeplora._lazy import lazy as _lazy_names

from .peft import SubspaceState, freeze_a, initialize, keep_adapter, update_subspace

if TYPE_CHECKING:
    from .fsdp2 import shard
    from .hf_trainer import KeepLoraCallback
else:
    __getattr__, __dir__ = _lazy_names(
        __name__,
        {
            "KeepLoraCallback": _Lazy(
                "keeplora.integrations.hf_trainer", "transformers", "pip install transformers accelerate"
            ),
            "shard": _Lazy("keeplora.integrations.fsdp2", "accelerate", "pip install accelerate"),
        },
    )

__all__ = ["KeepLoraCallback", "SubspaceState", "freeze_a", "initialize", "keep_adapter", "shard", "update_subspace"]
