"""Two tasks, one after the other, with Accelerate: ``python -m examples.with_accelerate``."""

from __future__ import annotations

from accelerate import Accelerator

from examples.small_tasks import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    Classifier,
    accuracies,
    batches,
    loss_fn,
    make_keeper,
    small_tasks,
    table,
)
from keeplora.integrations.accelerate import OneTask


def learn() -> list[list[float]]:
    accelerator = Accelerator(cpu=True)  # mixed_precision, gradient_accumulation_steps, … as ever
    keeper = make_keeper()
    classifier = Classifier(keeper.model)
    rows = [accuracies(keeper.model)]
    for data in small_tasks():
        loader = accelerator.prepare(batches(data))
        keeper.before_task(loader, loss_fn)
        optimizer = keeper.optimizer(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        # Made anew for every task: the parameters that are trained are new ones.
        task = OneTask(accelerator, keeper, classifier, optimizer)
        task.model.train()
        for batch in loader:
            with accelerator.accumulate(task.model):
                task.backward(task.model(**batch)["loss"])
                task.optimizer.step()
                task.optimizer.zero_grad()
        accelerator.print(keeper.after_task(loader))
        accelerator.free_memory()  # forgets the task's optimizer
        rows.append(accuracies(keeper.model))
    return rows


if __name__ == "__main__":
    print(table(learn()))
