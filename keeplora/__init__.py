"""KeepLoRA++ for PyTorch: teach a vision-language model new tasks without losing what it knows."""

from typing import TYPE_CHECKING

from keeplora._lazy import Lazy as _Lazy
from keeplora._lazy import lazy as _lazy_names
from keeplora._version import __version__

if TYPE_CHECKING:
    from keeplora.compare.comparison import Comparison, comparison
    from keeplora.compare.runs import run_benchmark
    from keeplora.families import find_targets
    from keeplora.integrations.hf_trainer import KeepLoraCallback
    from keeplora.integrations.peft import SubspaceState, freeze_a, initialize, keep_adapter, update_subspace
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
        load,
    )
    from keeplora.report.capacity import plot_capacity
    from keeplora.train.config import MethodConfig, RunConfig, load_config
    from keeplora.train.record import RunRecord
else:  # imported when first asked for: `keeplora --help` waits for no torch, a loop of one's own for no report
    __getattr__, __dir__ = _lazy_names(
        __name__,
        {
            "METHODS": _Lazy("keeplora.methods"),
            "Capacity": _Lazy("keeplora.methods"),
            "Comparison": _Lazy("keeplora.compare.comparison"),
            "KeepLora": _Lazy("keeplora.methods"),
            "KeepLoraCallback": _Lazy(
                "keeplora.integrations.hf_trainer", "transformers", "pip install transformers accelerate"
            ),
            "KeepLoraConfig": _Lazy("keeplora.methods"),
            "LayerCapacity": _Lazy("keeplora.methods"),
            "LayerCertificate": _Lazy("keeplora.methods"),
            "Method": _Lazy("keeplora.methods"),
            "MethodConfig": _Lazy("keeplora.train.config"),
            "RetentionCertificate": _Lazy("keeplora.methods"),
            "RunConfig": _Lazy("keeplora.train.config"),
            "RunRecord": _Lazy("keeplora.train.record"),
            "State": _Lazy("keeplora.methods"),
            "StateError": _Lazy("keeplora.methods"),
            "SubspaceState": _Lazy("keeplora.integrations.peft"),
            "comparison": _Lazy("keeplora.compare.comparison"),
            "configure": _Lazy("keeplora.methods"),
            "create": _Lazy("keeplora.methods"),
            "find_targets": _Lazy("keeplora.families"),
            "freeze_a": _Lazy("keeplora.integrations.peft"),
            "initialize": _Lazy("keeplora.integrations.peft"),
            "keep_adapter": _Lazy("keeplora.integrations.peft"),
            "load": _Lazy("keeplora.methods"),
            "load_config": _Lazy("keeplora.train.config"),
            "plot_capacity": _Lazy("keeplora.report.capacity", "matplotlib", "pip install matplotlib"),
            "run_benchmark": _Lazy("keeplora.compare.runs"),
            "update_subspace": _Lazy("keeplora.integrations.peft"),
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
    "keep_adapter",
    "load",
    "load_config",
    "plot_capacity",
    "run_benchmark",
    "update_subspace",
]
