"""Zero-shot accuracy of every task of the text benchmark: `python -m tools.minilm.check [--record]`."""

from __future__ import annotations

import argparse
import json

import torch

from keeplora.tasks.minilm import DATA, accuracy, load_encoder, load_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write zero_shot.json beside the tasks")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    tasks, witness = load_tasks()
    model = load_encoder()
    found = {task.name: 100 * accuracy(model, task, "test") for task in [*tasks, witness]}
    for name, value in found.items():
        print(f"{name:<10} {value:.2f}")
    if parsed.record:
        file = DATA / "zero_shot.json"
        file.write_text(json.dumps({name: round(value, 4) for name, value in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
