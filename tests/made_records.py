"""Records of runs that tests make by hand."""

import numpy as np

from keeplora.train.items import packed
from keeplora.train.record import RunRecord


def record_of(right, label="lora", seed=0, **rest):
    """A record of ``right[i][j]``, which items of task j are right after task i."""
    tasks = len(right)
    finished = {name: [1.0] * tasks for name in ("loss", "train_seconds", "switch_seconds", "evaluate_seconds")}
    figures = {
        "accuracy": [[float(np.mean(one)) for one in row] for row in right],
        "items": [len(one) for one in right[0]],
        "correct": [[packed(one) for one in row] for row in right],
        "validation": [[float(np.mean(one)) for one in row] for row in right],
        "certificates": [None] * tasks,
        "inference_seconds": [0.22, 0.2],
        "trainable": [64] * tasks,
        "steps": 30,
    }
    return RunRecord(label, seed, [f"t{j}" for j in range(tasks)], **{**finished, **figures, **rest})
