"""The embedded benchmark as a workload."""

from __future__ import annotations

from keeplora.tasks.classification import ClassificationWorkload

from . import load_model, load_tasks

NEEDS = {"open_clip": "pip install 'keeplora[clip]'"}

_SMALL_TASKS, _SMALL_IMAGES = 4, 200


def workload(device: str, *, small: bool = False) -> ClassificationWorkload:
    """The tasks and the model that are shipped with the package.

    ``small``: the first four tasks, validation and test splits of at most 200 images; for a look within minutes.
    """
    tasks, witness = load_tasks()
    if small:
        tasks, witness = [task.thinned(_SMALL_IMAGES) for task in tasks[:_SMALL_TASKS]], witness.thinned(_SMALL_IMAGES)
    return ClassificationWorkload(tasks, witness, load_model, device=device)
