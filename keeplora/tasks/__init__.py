"""Tasks, and benchmarks made of them: one folder each, or a function of one's own (see docs/add-a-benchmark.md)."""

from keeplora.families.class_head import adjusted_logits

from .catalog import benchmarks, load_workload
from .classification import (
    Batch,
    ClassificationWorkload,
    Loader,
    Split,
    Task,
    accuracy,
    classification_loss,
    correct,
    loader,
    normalize,
)
from .sequence import TaskSequence
from .workload import Batches, ItemWorkload, Workload

__all__ = [
    "Batch",
    "Batches",
    "ClassificationWorkload",
    "ItemWorkload",
    "Loader",
    "Split",
    "Task",
    "TaskSequence",
    "Workload",
    "accuracy",
    "adjusted_logits",
    "benchmarks",
    "classification_loss",
    "correct",
    "load_workload",
    "loader",
    "normalize",
]
