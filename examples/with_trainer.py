"""Two tasks, one after the other, with Hugging Face's Trainer: ``python -m examples.with_trainer``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import Trainer, TrainingArguments

from examples.small_tasks import (
    BATCH,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Classifier,
    accuracies,
    collate,
    loss_fn,
    make_keeper,
    samples,
    small_tasks,
    table,
)
from keeplora import KeepLoraCallback


def arguments(folder: Path) -> TrainingArguments:
    """As in the other loops: AdamW without a schedule, without clipping, batches in the data set's order."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        optim="adamw_torch",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def learn() -> list[list[float]]:
    keeper = make_keeper()
    classifier = Classifier(keeper.model)
    rows = [accuracies(keeper.model)]
    with tempfile.TemporaryDirectory() as out:
        for task in small_tasks():
            trainer = Trainer(
                classifier,
                arguments(Path(out) / task.name),
                train_dataset=samples(task),
                data_collator=collate(task),
                callbacks=[KeepLoraCallback(keeper)],
            )
            loader = trainer.get_train_dataloader()
            keeper.before_task(loader, loss_fn)
            trainer.train()
            print(keeper.after_task(loader))
            rows.append(accuracies(keeper.model))
    return rows


if __name__ == "__main__":
    print(table(learn()))
