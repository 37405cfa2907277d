"""Zero-shot accuracy of every task of the image benchmark: `python -m tools.clip_b16.check [--record] [--alone]`."""

from __future__ import annotations

import argparse
import json
import time

import torch

from keeplora.tasks.classification import Task, accuracy, classification_loss, loader
from keeplora.tasks.clip_b16 import load_model, load_tasks
from keeplora.tasks.clip_b16.model import DATA


def alone(task: Task, steps: int, rate: float) -> float:
    """Test accuracy after some steps of 16 on this task alone, by LoRA."""
    import keeplora

    model = load_model()
    settings = {"r": 16, "alpha": 16.0, "target_modules": ["v_proj", "out_proj"]}
    method = keeplora.create("lora", model, settings, progress=False)
    batches = loader(task.train, task.tokens, 16, seed=0)
    method.before_task(batches, classification_loss)
    optimizer = method.optimizer(lr=rate, weight_decay=0.01)
    done = 0
    while done < steps:
        for batch in batches:
            optimizer.zero_grad()
            classification_loss(model, batch).backward()
            optimizer.step()
            method.after_step()
            done += 1
            if done == steps:
                break
    method.after_task(batches, classification_loss)
    return accuracy(model, task, batch_size=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write zero_shot.json beside the tasks")
    parser.add_argument("--alone", action="store_true", help="train LoRA on every task alone, too")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--only", nargs="*")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    tasks, witness = load_tasks()
    model, found = load_model(), {}
    for task in [*tasks, witness]:
        if parsed.only and task.name not in parsed.only:
            continue
        start = time.process_time()
        found[task.name] = accuracy(model, task, batch_size=64)
        line = f"{task.name:<9} zero-shot {found[task.name]:.2f}"
        if parsed.alone and task is not witness:
            line += f", alone {alone(task, parsed.steps, parsed.rate):.2f}"
        print(f"{line} ({time.process_time() - start:.0f} CPU s)", flush=True)
    if parsed.record:
        rounded = {name: round(value, 4) for name, value in found.items()}
        (DATA / "zero_shot.json").write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
