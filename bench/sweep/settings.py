"""One setting at a time, around the settings of docs/settings.md: the rows behind that page's smaller tables.

    python -m bench.sweep.settings --out build/settings

Validation splits, seed 100, as in the search; rows go to the same bench/sweep/results.jsonl and are not repeated.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from bench.sweep.__main__ import HERE, Sweep
from bench.sweep.search import label_of
from keeplora.train.config import load_config

SEED = 100
BASE: dict[str, Any] = {
    "r": 16, "alpha": 16.0, "weight_energy": {"vision": 0.85, "text": 0.85}, "feature_energy": 0.95,
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
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="working folder, for resuming; it can be deleted afterwards")
    parsed = parser.parse_args()
    base = replace(load_config("demo"), evaluate_on="validation", out=parsed.out, workers=0, tensorboard=False)
    sweep = Sweep(base, HERE / "results.jsonl")
    wanted = [BASE | change for change in CHANGES]
    for settings in wanted:  # one by one: each row is written when it is there
        sweep.run([("keeplora", settings, SEED)])
    rows = {row["label"]: row for row in sweep.rows if row["seed"] == SEED}
    print("| | Transfer | Avg | Last | Learn |\n|---|---|---|---|---|")
    for change, settings in zip(CHANGES, wanted, strict=True):
        row = rows[label_of("keeplora", settings)]
        figures = " | ".join(f"{row[name]:.1f}" for name in ("transfer", "avg", "last", "learn"))
        print(f"| {', '.join(f'{name} {value}' for name, value in change.items()) or 'base'} | {figures} |")


if __name__ == "__main__":
    main()
