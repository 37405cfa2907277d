"""KeepLoRA++ for PyTorch: teach a vision-language model new tasks without losing what it knows."""

from typing import TYPE_CHECKING

from keeplora._lazy import Lazy as _Lazy
from keeplora._lazy import lazy as _lazy_names
from keeplora._version import __version__
from keeplora.families import find_targets
from keeplora.integrations import SubspaceState, freeze_a, initialize, update_subspace
from keeplora.methods import (
    METHODS,
    Capacity,
    KeepLora,
    KeepLoraConfig,
    LayerCapacity,
    LayerCertificate,
    Method,
    RetentionCertificate,
    State,
    StateError,
    configure,
    create,
)

if TYPE_CHECKING:
    from keeplora.compare.comparison import Comparison, comparison
    from keeplora.compare.runs import run_benchmark
    from keeplora.integrations.hf_trainer import KeepLoraCallback
    from keeplora.report.capacity import plot_capacity
    from keeplora.train.config import MethodConfig, RunConfig, load_config
    from keeplora.train.record import RunRecord
else:  # a training loop of one's own needs none of these, and pays for none
    __getattr__, __dir__ = _lazy_names(
        __name__,
        {
            "Comparison": _Lazy("keeplora.compare.comparison"),
            "KeepLoraCallback": _Lazy(
                "keeplora.integrations.hf_trainer", "transformers", "pip install transformers accelerate"
            ),
            "MethodConfig": _Lazy("keeplora.train.config"),
            "RunConfig": _Lazy("keeplora.train.config"),
            "RunRecord": _Lazy("keeplora.train.record"),
            "comparison": _Lazy("keeplora.compare.comparison"),
            "load_config": _Lazy("keeplora.train.config"),
            "plot_capacity": _Lazy("keeplora.report.capacity", "matplotlib", "pip install matplotlib"),
            "run_benchmark": _Lazy("keeplora.compare.runs"),
        },
    )

__all__ = [
    "METHODS",
    "Capacity",
    "Comparison",
    "KeepLora",
    "KeepLoraCallback",
    "KeepLoraConfig",
    "LayerCapacity",
    "LayerCertificate",
    "Method",
    "MethodConfig",
    "RetentionCertificate",
    "RunConfig",
    "RunRecord",
    "State",
    "StateError",
    "SubspaceState",
    "__version__",
    "comparison",
    "configure",
    "create",
    "find_targets",
    "freeze_a",
    "initialize",
    "load_config",
    "plot_capacity",
    "run_benchmark",
    "update_subspace",
]
