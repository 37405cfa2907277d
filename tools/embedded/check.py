"""Measure what the tasks are worth: zero-shot, learned alone, and forgetting by full fine-tuning in sequence.

`python -m tools.embedded.check --help`
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from open_clip.model import CLIP
from torch.nn.attention import SDPBackend, sdpa_kernel

from keeplora.tasks.classification import Batch, Task, accuracy, classification_loss, loader
from keeplora.tasks.embedded import DATA, load_model, load_tasks


def endless(task: Task, batch: int, seed: int) -> Iterator[Batch]:
    batches = loader(task.train, task.tokens, batch, seed=seed, drop_last=True)
    while True:
        yield from batches


def fine_tune(model: CLIP, task: Task, *, steps: int, batch: int, lr: float, seed: int, half: bool) -> None:
    """AdamW on all parameters but the temperature, ten steps of warm-up, cosine decay."""
    model.train()
    parameters = [p for name, p in model.named_parameters() if name != "logit_scale"]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 10) * (1 + math.cos(math.pi * s / steps)) / 2
    )
    for _, data in zip(range(steps), endless(task, batch, seed), strict=False):
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = classification_loss(model, data)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=DATA, help="directory with model.safetensors")
    parser.add_argument("--tasks", nargs="*", help="names; default: all")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3], help="the best on validation is shown")
    parser.add_argument("--sequence", action="store_true", help="train the tasks one after the other")
    parser.add_argument("--record", action="store_true", help="write zero_shot.json beside the checkpoint and stop")
    parser.add_argument("--half", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks, witness = load_tasks(args.tasks)
    model = load_model(args.checkpoint)
    shown = [*tasks, witness]
    before = [accuracy(model, task) for task in shown]
    print("zero-shot", " ".join(f"{t.name} {a:.1f}" for t, a in zip(shown, before, strict=True)), flush=True)
    if args.record:
        stored = {task.name: share for task, share in zip(shown, before, strict=True)}
        (args.checkpoint / "zero_shot.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf8")
        return
    torch.manual_seed(args.seed)
    options = {"steps": args.steps, "batch": args.batch, "seed": args.seed, "half": args.half}
    if args.sequence:
        for lr in args.lr:
            moved = copy.deepcopy(model)
            for task in tasks:
                fine_tune(moved, task, lr=lr, **options)
                print(
                    f"lr {lr:g} after {task.name:9s}", " ".join(f"{accuracy(moved, t):5.1f}" for t in shown), flush=True
                )
        return
    for task, start in zip(tasks, before, strict=False):
        results = []
        for lr in args.lr:
            moved, begun = copy.deepcopy(model), time.perf_counter()
            fine_tune(moved, task, lr=lr, **options)
            spent = time.perf_counter() - begun
            others = {
                t.name: round(accuracy(moved, t) - a) for t, a in zip(shown, before, strict=True) if t is not task
            }
            results.append((accuracy(moved, task, "validation"), lr, accuracy(moved, task), spent, others))
        best = max(results, key=lambda r: r[0])
        print(f"{task.name:9s} {start:5.1f} -> {best[2]:5.1f} (lr {best[1]:g}, {best[3]:.0f} s; "
              + ", ".join(f"{r[1]:g}: {r[2]:.1f}" for r in results) + f") others {best[4]}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
