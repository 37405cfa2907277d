"""The accuracies of a model on every task, and what a run keeps of them for choices and paired tests."""

from __future__ import annotations

from torch import nn

from keeplora.tasks.workload import ItemWorkload, Workload
from keeplora.train.config import BOTH, RunConfig
from keeplora.train.items import packed
from keeplora.train.record import RunRecord

__all__ = ["evaluate"]


def evaluate(
    config: RunConfig, workload: Workload, model: nn.Module, record: RunRecord, *, trained: bool
) -> tuple[list[float], float | None]:
    """Accuracy on every task and on the witness, after the next task of ``record``; its other figures go into it.

    A model that is never ``trained`` is evaluated once.
    """
    both, size = config.evaluate_on == BOTH, config.evaluation_batch_size
    if record.accuracy and not trained:
        if both:
            record.validation.append(list(record.validation[0]))
            record.correct.append(list(record.correct[0]))
        return list(record.accuracy[0]), next(iter(record.witness), None)
    if both:
        row = _items(workload, model, record, size, trained)
    else:
        row = [workload.accuracy(model, task, config.split, size) for task in range(len(record.tasks))]
    return row, None if workload.witness is None else workload.accuracy(model, None, config.split, size)


def _items(workload: Workload, model: nn.Module, record: RunRecord, size: int, trained: bool) -> list[float]:
    """Accuracy on every test split; which items were right and the figures of the validation splits go to the record.

    Of validation only what Transfer and Last are made of is evaluated: tasks not yet learned, and all at the end.
    """
    assert isinstance(workload, ItemWorkload)  # checked before anything runs
    learned, tasks = len(record.accuracy), range(len(record.tasks))
    right = [workload.correct(model, task, "test", size).cpu() for task in tasks]
    whole = learned == tasks[-1] or not trained
    record.items = [len(one) for one in right]
    record.correct.append([packed(one) for one in right])
    record.validation.append(
        [workload.accuracy(model, task, "validation", size) if whole or task > learned else None for task in tasks]
    )
    return [int(one.sum()) / len(one) for one in right]
