"""Find every method's settings on the VALIDATION splits of the embedded benchmark; the test splits are never read.

    python -m tools.sweep --methods full lora keeplora keeplora++ --out build/sweep
    python -m tools.sweep --comparison embedded --out build/sweep-compare

The second form chooses the learning rates of `keeplora compare` (tools/sweep/rates.toml, results in
compare_NAME.jsonl): one seed, on the first tasks of the benchmark (its small form) with the full budget's training of
each.

The rule, one for every method: best Last, less five points for every point of Transfer lost beyond three under
zero-shot. Full fine-tuning is there to show what the tasks allow, so it is chosen by Last alone. The seeds (100, 101)
are not those of the demo (0, 1, 2). One JSON line per run goes to tools/sweep/results.jsonl; runs that stand there
already, made with the same settings on the same data, are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from keeplora._untrusted import parse_toml
from keeplora.compare.comparison import comparison
from keeplora.compare.console import Console
from keeplora.compare.runs import run_benchmark
from keeplora.report.summary import run_values
from keeplora.tasks.catalog import load_workload
from keeplora.train.config import RunConfig, fingerprint, load_config
from keeplora.train.events import Event
from keeplora.train.record import load_result, run_folder
from tools.sweep.search import Settings, as_method, candidates, label_of, ranked

HERE = Path(__file__).parent
REFERENCES = ("full", "joint")
"""Methods that show what the tasks allow: chosen by Last alone."""


class Sweep:
    """All runs so far, and how to make more of them."""

    def __init__(self, base: RunConfig, results: Path) -> None:
        self.base, self.results = base, results
        self.data = load_workload(base.benchmark).fingerprint()
        self.rows: list[dict[str, Any]] = []
        if results.is_file():
            lines = results.read_text(encoding="utf-8").splitlines()
            self.rows = [row for row in map(json.loads, lines) if self.same_conditions(row)]

    def same_conditions(self, row: dict[str, Any]) -> bool:
        return bool(row["data"] == self.data and row["shared"] == self.shared())

    def shared(self) -> str:
        """A hash of everything but methods and seeds."""
        plain = self.base.as_dict()
        drop = ("methods", "method", "seeds", "out", "workers", "tensorboard", "keep_states")
        return fingerprint({name: value for name, value in plain.items() if name not in drop})

    @property
    def zero_shot(self) -> float:
        """Transfer of the model as it was pretrained; measured when first asked for."""
        if not self.of("zero-shot"):
            alone = replace(self.base, methods=("zero-shot",), method={}, seeds=(0,))
            [record] = run_benchmark(alone)
            self.add("zero-shot", "zero-shot", {}, 0, run_values(record))
        return float(self.of("zero-shot")[0]["transfer"])

    def of(self, method: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["method"] == method]

    def run(self, wanted: list[tuple[str, Settings, int]]) -> None:
        """Run (method, settings, seed) triples that have no row yet, and write their rows."""
        have = {(row["label"], row["seed"]) for row in self.rows}
        missing = [(m, s, seed) for m, s, seed in wanted if (label_of(m, s), seed) not in have]
        for seed in dict.fromkeys(seed for _, _, seed in missing):
            chosen = {label_of(m, s): (m, s) for m, s, at in missing if at == seed}
            config = replace(
                self.base,
                methods=tuple(chosen),
                method={label: as_method(m, s) for label, (m, s) in chosen.items()},
                seeds=(seed,),
            )
            run_benchmark(config, console=partial(self.hear, config, chosen, Console(0)))

    def hear(self, config: RunConfig, chosen: dict[str, tuple[str, Settings]], console: Console, event: Event) -> None:
        """Show an event; the row of a run that is done is written at once, a sweep may be stopped at any time."""
        console(event)
        if event.kind == "done" and event.label in chosen:
            seed = event.seed
            record = load_result(run_folder(config.out, event.label, seed), config.identity(event.label, seed))
            assert record is not None
            self.add(event.label, *chosen[event.label], seed, run_values(record))

    def add(self, label: str, method: str, settings: Settings, seed: int, values: dict[str, float | None]) -> None:
        row = {
            "method": method, "seed": seed, "label": label, "settings": settings,
            **{name: None if value is None else round(value, 4) for name, value in values.items()},
            "epochs": self.base.epochs, "steps": self.base.steps, "split": self.base.evaluate_on,
            "data": self.data, "shared": self.shared(),
        }  # fmt: skip
        self.rows.append(row)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def floor(sweep: Sweep, grid: dict[str, Any], method: str) -> float:
    """The Transfer that the rule holds a method to; none for a method that only shows what the tasks allow."""
    return 0.0 if grid[method].get("reference") else sweep.zero_shot


def search(sweep: Sweep, grid: dict[str, Any], methods: Sequence[str], seeds: Sequence[int]) -> None:
    """All stages of all methods side by side, so that no core waits; then the finalists on every seed."""
    first = seeds[0]
    best: dict[str, Settings] = {method: dict(grid[method].get("start", {})) for method in methods}
    seen: dict[str, set[str]] = {method: set() for method in methods}  # a replay must not know later stages

    def order(method: str) -> list[Settings]:
        rows = [row for row in sweep.of(method) if row["label"] in seen[method]]
        return [settings for settings, _ in ranked(rows, [first], floor(sweep, grid, method))]

    for number in range(max(len(grid[method]["stages"]) for method in methods)):
        tried: dict[str, list[Settings]] = {}
        for method in methods:
            stages = grid[method]["stages"]
            if number < len(stages):
                tried[method] = candidates(best[method], stages[number])
                seen[method] |= {label_of(method, settings) for settings in tried[method]}
        runs = [(method, settings, first) for method, many in tried.items() for settings in many]
        print(f"stage {number + 1}: {len(runs)} settings", file=sys.stderr, flush=True)
        sweep.run(runs)
        for method in tried:
            best[method] = order(method)[0]
    finalists = [
        (method, settings, seed)
        for method in methods
        for settings in order(method)[: grid["finalists"]]
        for seed in seeds[1:]
    ]
    print(f"finalists: {len(finalists)} runs", file=sys.stderr, flush=True)
    sweep.run(finalists)


def report(sweep: Sweep, grid: dict[str, Any], methods: Sequence[str], seeds: Sequence[int]) -> str:
    """The choice of every method as TOML for a configuration, and the runners-up as comments."""
    lines = [
        "# chosen: best validation Last, less 5 per point of Transfer lost beyond 3; mean over seeds "
        + str(list(seeds))
    ]
    for method in methods:
        order = ranked(sweep.of(method), seeds, floor(sweep, grid, method))
        lines += ["", f'[method."{method}"]']
        lines += [f"{name} = {_toml(value)}" for name, value in order[0][0].items()]
        for settings, means in order[:4]:
            figures = " ".join(f"{name} {value:.1f}" for name, value in means.items())
            lines.append(f"# {figures} · {json.dumps(settings)}")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + " }"
    return json.dumps(value)


def on_validation(base: RunConfig, doc: str | None) -> RunConfig:
    """``base`` on the validation splits, with the folder and the workers of the command line; ``doc`` is its help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="working folder, for resuming; it can be deleted afterwards")
    parser.add_argument("--workers", type=int, default=2)
    parsed = parser.parse_args()
    return replace(base, evaluate_on="validation", out=parsed.out, workers=parsed.workers, tensorboard=False)


def small_benchmark(name: str) -> RunConfig:
    """A comparison's full training of every task, on its small benchmark."""
    small = comparison(name, budget="small").config
    return replace(comparison(name, budget="full").config, benchmark=small.benchmark)


def grid_of_rates(base: RunConfig, rates: dict[str, list[float]]) -> dict[str, Any]:
    """A grid over every method's learning rate, around the comparison's other settings.

    Two rates three times apart, three times more and less than the better one, then 0.6 and 1.7 times the best.
    """
    return {
        "finalists": 1,
        **{
            method: {
                "start": dict(base.of(method).settings),
                "stages": [
                    *({"try": [{"learning_rate": rate}]} for rate in tried),
                    *({"scale": {"learning_rate": factors}} for factors in ([0.3333, 3.333], [0.6, 1.7])),
                ],
                "reference": method in REFERENCES,
            }
            for method, tried in rates.items()
        },
    }


def main() -> None:
    grid = parse_toml((HERE / "grid.toml").read_bytes())
    rates = parse_toml((HERE / "rates.toml").read_bytes())
    known = sorted({*(name for name, entry in grid.items() if isinstance(entry, dict)), *rates["embedded"]})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=known, metavar="NAME")
    parser.add_argument("--comparison", choices=list(rates), help="choose learning rates for keeplora compare")
    parser.add_argument("--out", required=True, help="working folder, for resuming; it can be deleted afterwards")
    parser.add_argument("--results", type=Path, help="default: results.jsonl or compare_NAME.jsonl here")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 100 101; with --comparison 100")
    parser.add_argument("--config", default="demo", help="configuration that gives benchmark, epochs, batch size, …")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parsed = parser.parse_args()
    if parsed.comparison:
        parsed.seeds = parsed.seeds or [100]
        parsed.results = parsed.results or HERE / f"compare_{parsed.comparison}.jsonl"
        base = small_benchmark(parsed.comparison)
        grid = grid_of_rates(base, rates[parsed.comparison])
    else:
        parsed.seeds, parsed.results = parsed.seeds or [100, 101], parsed.results or HERE / "results.jsonl"
        base = load_config(parsed.config)
    parsed.methods = parsed.methods or [name for name, entry in grid.items() if isinstance(entry, dict)]
    taken = sorted(set(parsed.seeds) & set(base.seeds))
    if taken:
        parser.error(f"--seeds must not be those the configuration is evaluated with, got {taken}")
    base = replace(
        base, evaluate_on="validation", out=parsed.out, workers=parsed.workers, tensorboard=False,
        **({"epochs": parsed.epochs, "steps": None} if parsed.epochs else {}),
    )  # fmt: skip
    started = time.monotonic()
    sweep = Sweep(base, parsed.results)
    search(sweep, grid, parsed.methods, parsed.seeds)
    print(report(sweep, grid, parsed.methods, parsed.seeds))
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
