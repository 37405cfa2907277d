"""One setting at a time, around the settings of docs/settings.md: the rows behind that page's smaller tables.

    python -m tools.sweep.settings --out build/settings
    python -m tools.sweep.settings --times bench/results/cpu/settings_times.json

Validation splits, seed 100, as in the search; rows go to the same tools/sweep/results.jsonl and are not repeated. The
second form measures what each setting costs, on an idle machine in two minutes: a step and the passes of one task.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.run import machine
from keeplora.methods import create
from keeplora.statistics import first_batches
from keeplora.tasks.catalog import load_workload
from keeplora.tasks.workload import Workload
from keeplora.train.config import RunConfig, load_config
from tools.sweep.__main__ import HERE, Sweep
from tools.sweep.search import TABLE, as_method, cells, label_of

SEED = 100
BASE: dict[str, Any] = {
    "r": 16, "alpha": 16.0, "weight_energy": {"vision": 0.85, "text": 0.85}, "feature_energy": 0.95, "balance": False,
    "learning_rate": 0.003, "target_modules": ["v_proj", "out_proj"],
}  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    {},
    {"r": 4, "alpha": 4.0},
    {"alpha": 32.0},
    {"weight_energy": {"vision": 0.0, "text": 0.0}},
    {"weight_side": "output"},
    {"feature_statistic": "slot_mean", "feature_energy": 0.99},
    {"init_b": "gradient"},
    {"target_modules": "all-linear"},
    {"data_fraction": 0.25},
    {"r": 32, "alpha": 32.0},
    {"gradient_statistic": "sketch"},
    {"feature_statistic": "sketch", "sketch_share": 0.5},
    {"dropout": 0.1},
    {"towers": ["vision"], "weight_energy": 0.85},
    {"towers": ["text"], "weight_energy": 0.85},
    {"rslora": True},
]


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def costs(base: RunConfig, workload: Workload, settings: dict[str, Any], steps: int = 20) -> dict[str, float]:
    """Median seconds of a step, and seconds of what comes before and after the first task."""
    method = create("keeplora", workload.model(), dict(as_method("keeplora", settings).settings))
    batches = workload.batches(0, base.batch_size, SEED)
    seen = first_batches(batches, base.switch_fraction)
    before = seconds(lambda: method.before_task(seen, workload.loss))
    optimizer = method.optimizer(lr=settings["learning_rate"])

    def step(batch: Any) -> None:
        optimizer.zero_grad()
        workload.loss(method.model, batch).backward()
        optimizer.step()
        method.after_step()

    method.model.train()
    taken = [seconds(lambda batch=batch: step(batch)) for batch, _ in zip(batches, range(steps), strict=False)]
    return {"step_s": statistics.median(taken), "before_s": before, "after_s": seconds(lambda: method.after_task(seen))}


def measure_costs(base: RunConfig, file: Path, rounds: int = 3) -> None:
    """All settings in turn, several times over; medians of the rounds."""
    torch.set_num_threads(1)
    workload = load_workload(base.benchmark)
    found: list[list[dict[str, float]]] = []
    with warnings.catch_warnings(), sdpa_kernel([SDPBackend.MATH]):  # as in the runs
        warnings.simplefilter("ignore")  # layers with little room
        for _ in range(rounds):
            found.append([costs(base, workload, BASE | change) for change in CHANGES])
    rows = [
        {"change": change, **{name: statistics.median(row[name] for row in every) for name in every[0]}}
        for change, every in zip(CHANGES, zip(*found, strict=True), strict=True)
    ]
    file.write_text(json.dumps({"machine": machine(torch.device("cpu")), "rows": rows}, indent=1) + "\n")
    for row in rows:
        passes = f"{row['before_s']:.2f} s before and {row['after_s']:.2f} s after a task"
        print(f"{row['change']} {1000 * row['step_s']:.0f} ms/step, {passes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="working folder, for resuming; it can be deleted afterwards")
    parser.add_argument("--times", type=Path, metavar="FILE", help="measure what settings cost, and write it here")
    parsed = parser.parse_args()
    if parsed.times:
        measure_costs(load_config("demo"), parsed.times)
        return
    if not parsed.out:
        parser.error("--out FOLDER, or --times FILE, must be given")
    base = replace(load_config("demo"), evaluate_on="validation", out=parsed.out, workers=0, tensorboard=False)
    sweep = Sweep(base, HERE / "results.jsonl")
    wanted = [BASE | change for change in CHANGES]
    for settings in wanted:  # one by one: each row is written when it is there
        sweep.run([("keeplora", settings, SEED)])
    rows = {row["label"]: row for row in sweep.rows if row["seed"] == SEED}
    print(f"| {TABLE}")
    for change, settings in zip(CHANGES, wanted, strict=True):
        print(cells(change, rows[label_of("keeplora", settings)], "base"))


if __name__ == "__main__":
    main()
