"""The settings of `make demo`: every method as good as it can be without losing more than full fine-tuning does.

    python -m tools.sweep.demo --out build/sweep-demo

The best Last whose Transfer is at least full fine-tuning's, on the validation splits, with seed 100, which the demo
does not use. Full fine-tuning is at the rate that `python -m tools.sweep` chose by its Last alone. Rows go to
tools/sweep/demo.jsonl and are not repeated; it prints the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keeplora.train.config import load_config
from tools.sweep.__main__ import HERE, Sweep, on_validation
from tools.sweep.search import TABLE, Row, Settings, cells

SEED = 100
LORA: Settings = {"r": 16, "alpha": 16.0}
KEEPLORA: Settings = {**LORA, "weight_energy": {"vision": 0.85, "text": 0.85}, "feature_energy": 0.95, "balance": False}
OUT, ALL = {"target_modules": ["v_proj", "out_proj"]}, {"target_modules": "all-linear"}
TRIED: dict[str, list[Settings]] = {
    "full": [{"learning_rate": 0.00018}],
    "lora": [
        {**LORA, **OUT, "learning_rate": 0.001},
        *({**LORA, **ALL, "learning_rate": rate} for rate in (0.0001, 0.0003, 0.0006)),
    ],
    "keeplora": [
        {**KEEPLORA, **OUT, "learning_rate": 0.003},
        *({**KEEPLORA, **ALL, "learning_rate": rate} for rate in (0.0006, 0.001, 0.0014, 0.0018)),
    ],
    "keeplora++": [
        {**KEEPLORA, "feature_energy": 0.9, **ALL, "learning_rate": rate} for rate in (0.001, 0.0018, 0.0025)
    ],
}  # fmt: skip


def choice(rows: Sequence[Row], method: str) -> Row:
    """The row of a method with the best Last among those that lose no more Transfer than full fine-tuning."""
    [full] = [row for row in rows if row["method"] == "full"]
    mine = [row for row in rows if row["method"] == method and row["transfer"] >= full["transfer"]]
    return max(mine, key=lambda row: float(row["last"]))


def main() -> None:
    sweep = Sweep(on_validation(load_config("demo"), __doc__), HERE / "demo.jsonl")
    wanted: list[tuple[str, dict[str, Any], int]] = [
        (method, settings, SEED) for method, many in TRIED.items() for settings in many
    ]
    sweep.run(wanted)
    print(f"| method | {TABLE}---|")
    for row in sweep.rows:
        chosen = ", chosen" if row is choice(sweep.rows, row["method"]) else ""
        shown = {name: row["settings"][name] for name in ("target_modules", "learning_rate") if name in row["settings"]}
        print(f"| {row['method']}{chosen} {cells(shown, row, '')}")


if __name__ == "__main__":
    main()
