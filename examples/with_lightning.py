"""Two tasks, one after the other, with Lightning: ``python -m examples.with_lightning``."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor

import keeplora
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


class OneTask(lightning.LightningModule):
    """The task a keeper has open. Checkpoints carry the keeper's state, so that another process can go on."""

    def __init__(self, keeper: keeplora.KeepLora):
        super().__init__()
        self.model = keeper.model
        self.keeper = keeper

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return loss_fn(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.keeper.trainable_parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["keeplora"] = vars(self.keeper.state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.keeper.load_state(keeplora.State(**checkpoint["keeplora"]))


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
        trainer.fit(OneTask(keeper), loader)
        print(keeper.after_task(loader))
        rows.append(accuracies(keeper.model))
    return rows


if __name__ == "__main__":
    print(table(learn()))
