"""The embedded benchmark as a workload."""

from __future__ import annotations

from dataclasses import replace

from keeplora.tasks.classification import ClassificationWorkload, Split, Task

from . import load_model, load_tasks

NEEDS = {"open_clip": "pip install 'keeplora[clip]'"}

_SMALL_TASKS, _SMALL_IMAGES = 4, 200


def workload(device: str, *, small: bool = False) -> ClassificationWorkload:
    """The tasks and the model that are shipped with the package.

    ``small``: the first four tasks, validation and test splits of at most 200 images; for a look within minutes.
    """
    tasks, witness = load_tasks()
    if small:
        tasks, witness = [_small(task) for task in tasks[:_SMALL_TASKS]], _small(witness)
    return ClassificationWorkload(tasks, witness, load_model, device=device)


def _small(task: Task) -> Task:
    def thinned(split: Split) -> Split:
        every = -(-len(split) // _SMALL_IMAGES)
        return Split(split.images[::every], split.labels[::every])

    return replace(task, validation=thinned(task.validation), test=thinned(task.test))
