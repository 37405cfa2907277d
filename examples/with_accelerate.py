"""Two tasks, one after the other, with Accelerate: ``python -m examples.with_accelerate``."""

from __future__ import annotations

import torch
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


def learn() -> list[list[float]]:
    accelerator = Accelerator(cpu=True)  # mixed_precision, gradient_accumulation_steps, … as ever
    keeper = make_keeper()
    classifier = Classifier(keeper.model)
    rows = [accuracies(keeper.model)]
    for task in small_tasks():
        loader = accelerator.prepare(batches(task))
        keeper.before_task(loader, loss_fn)
        optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        # Prepared anew for every task: the parameters that are trained are new ones.
        model, optimizer = accelerator.prepare(classifier, optimizer)
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(keeper.after_task(loader))
        accelerator.free_memory()  # forgets the task's optimizer
        rows.append(accuracies(keeper.model))
    return rows


if __name__ == "__main__":
    print(table(learn()))
