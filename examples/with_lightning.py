"""Two tasks, one after the other, with Lightning: ``python -m examples.with_lightning``."""

from __future__ import annotations

import lightning

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
from keeplora.integrations.lightning import OneTask


def learn() -> list[list[float]]:
    keeper = make_keeper()
    rows = [accuracies(keeper.model)]
    for task in small_tasks():
        loader = batches(task)
        keeper.before_task(loader, loss_fn)
        keeper.model.train()
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(OneTask(keeper, loss_fn, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY), loader)
        print(keeper.after_task(loader))
        rows.append(accuracies(keeper.model))
    return rows


if __name__ == "__main__":
    print(table(learn()))
