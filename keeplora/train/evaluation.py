"""The accuracies of a model on every task, and what a run keeps of them for choices and paired tests."""

from __future__ import annotations

from keeplora.methods.method import Method
from keeplora.train.config_checks import BOTH
from keeplora.train.evaluated import Evaluations
from keeplora.train.items import packed
from keeplora.train.record import RunRecord

__all__ = ["evaluate"]


def evaluate(evaluations: Evaluations, method: Method, record: RunRecord) -> tuple[list[float], float | None]:
    """Accuracy on every task and on the witness, after the next task of ``record``; its other figures go into it.

    A model that is never trained is evaluated once.
    """
    config, workload = evaluations.config, evaluations.workload
    both = config.evaluate_on == BOTH
    if record.accuracy and not method.trains:
        if both:
            record.validation.append(list(record.validation[0]))
            record.correct.append(list(record.correct[0]))
        record.reused.append(0)
        return list(record.accuracy[0]), next(iter(record.witness), None)
    evaluations.begin(method)
    if both:
        row = _items(evaluations, record, method.trains)
    else:
        row = [evaluations.accuracy(task, config.split) for task in range(len(record.tasks))]
    witness = None if workload.witness is None else evaluations.accuracy(None, config.split)
    record.reused.append(evaluations.reused)
    return row, witness


def _items(evaluations: Evaluations, record: RunRecord, trained: bool) -> list[float]:
    """Accuracy on every test split; which items were right and the figures of the validation splits go to the record.

    Of validation only what Transfer and Last are made of is evaluated: tasks not yet learned, and all at the end.
    """
    learned, tasks = len(record.accuracy), range(len(record.tasks))
    right = [evaluations.correct(task, "test") for task in tasks]
    whole = learned == tasks[-1] or not trained
    record.items = [len(one) for one in right]
    record.correct.append([packed(one) for one in right])
    record.validation.append(
        [evaluations.accuracy(task, "validation") if whole or task > learned else None for task in tasks]
    )
    return [int(one.sum()) / len(one) for one in right]
