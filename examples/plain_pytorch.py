"""Two tasks, one after the other, in a plain PyTorch loop: ``python -m examples.plain_pytorch``."""

from __future__ import annotations

import torch

from examples.small_tasks import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    accuracies,
    batches,
    loss_fn,
    make_keeper,
    small_tasks,
    table,
)


def learn() -> list[list[float]]:
    keeper = make_keeper()
    rows = [accuracies(keeper.model)]
    for task in small_tasks():
        loader = batches(task)
        keeper.before_task(loader, loss_fn)
        optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        keeper.model.train()
        for batch in loader:
            loss_fn(keeper.model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        print(keeper.after_task(loader))
        rows.append(accuracies(keeper.model))
    return rows


if __name__ == "__main__":
    print(table(learn()))
