"""Why a method stands where it stands in `keeplora compare`: one of its settings changed at a time.

    python -m tools.sweep.variants --out build/variants

On the validation data, tasks and training that its learning rate was chosen with (small benchmark, seed 100), at that
rate. Rows go to tools/sweep/variants.jsonl and are not repeated.
"""

from __future__ import annotations

from typing import Any

from tools.sweep.__main__ import HERE, Sweep, on_validation, small_benchmark
from tools.sweep.search import TABLE, Settings, cells, label_of

SEED = 100
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "o-lora": [{"orthogonality": 0.05}, {"orthogonality": 0.0}, {"dropout": 0.0}],
    "loda": [{"general_share": 0.25}, {"general_share": 0.75}, {"recalibrate": False}],
    "gpm": [{"feature_energy": 0.9}, {"feature_energy": 0.99}],
    "sd-lora": [{"magnitude": 0.4}],
    "duallora": [{"feature_energy": 0.99}],
}


def main() -> None:
    base = on_validation(small_benchmark("embedded"), __doc__)
    sweep = Sweep(base, HERE / "variants.jsonl")
    wanted: list[tuple[str, Settings, int]] = []
    for method, changes in VARIANTS.items():
        chosen = {**base.of(method).settings, "learning_rate": base.of(method).learning_rate}
        wanted += [(method, chosen | change, SEED) for change in ({}, *changes)]
    sweep.run(wanted)
    rows = {row["label"]: row for row in sweep.rows}
    print(f"| method | {TABLE}---|")
    changes = [change for many in VARIANTS.values() for change in ({}, *many)]
    for (method, settings, _), change in zip(wanted, changes, strict=True):
        print(f"| {method} {cells(change, rows[label_of(method, settings)], 'as compared')}")


if __name__ == "__main__":
    main()
