"""Two tasks, one after the other, in a plain PyTorch loop: ``python -m examples.plain_pytorch``."""

from __future__ import annotations

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
        optimizer = keeper.optimizer(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        keeper.model.train()
        for batch in loader:
            loss, penalty = loss_fn(keeper.model, batch), keeper.penalty()  # which KeepLoRA has none of, O-LoRA has
            (loss if penalty is None else loss + penalty).backward()
            optimizer.step()
            keeper.after_step()
            optimizer.zero_grad()
        print(keeper.after_task(loader))
        rows.append(accuracies(keeper.model))
    return rows


if __name__ == "__main__":
    print(table(learn()))
