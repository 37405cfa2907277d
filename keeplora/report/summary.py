"""The numbers of a finished benchmark: summary.json, metrics.csv and one accuracy matrix per run."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keeplora._files import write_atomic, write_json
from keeplora._made_of import version
from keeplora.report.capacity import tightest_run
from keeplora.report.instruction_metrics import instruction_metrics
from keeplora.report.metrics import continual_metrics, mean_std
from keeplora.train.config import ZERO_SHOT, RunConfig
from keeplora.train.measure import KINDS
from keeplora.train.record import RunRecord, run_folder

METRICS = ("transfer", "avg", "last", "forgetting", "learn")
"""In percent."""
COSTS = ("train_seconds", "switch_seconds", "evaluate_seconds", "peak_bytes", "trainable_parameters")
ROOM = ("free_share", "forecast", "median_forecast")
"""Of the seed with the least room; see ``keeplora.Capacity``."""
_PACKAGES = ("keeplora", "torch", "open_clip_torch", "numpy", "safetensors")


def run_values(record: RunRecord) -> dict[str, float | None]:
    """Metrics (percent) and costs of one run; None where they are means over nothing.

    ``train_seconds`` are the optimizer steps, ``switch_seconds`` what the method does before and after a task;
    both summed over tasks. ``evaluate_seconds`` is None where evaluations were looked up.
    ``trainable_parameters`` is the largest number during a task, ``seconds_per_step`` a mean over all steps,
    ``inference_overhead`` what an evaluation takes longer than with the untouched model, in percent.
    """
    accuracy = 100 * np.asarray(record.accuracy, dtype=np.float64)
    values: dict[str, float | None] = continual_metrics(accuracy).as_dict() | instruction_metrics(accuracy).as_dict()
    if record.witness:
        values["witness"] = 100 * record.witness[-1]
        values["witness_avg"] = 100 * float(np.mean(record.witness))
    ours, plain = record.inference_seconds
    return {
        **values,
        "train_seconds": sum(record.train_seconds),
        "switch_seconds": sum(record.switch_seconds),
        "evaluate_seconds": None if sum(record.reused) else sum(record.evaluate_seconds),
        "peak_bytes": record.peak_bytes,
        "trainable_parameters": max(record.trainable, default=0),
        "seconds_per_step": sum(record.train_seconds) / record.steps if record.steps else None,
        "inference_overhead": 100 * (ours / plain - 1),
    }


def summarize(config: RunConfig, records: Sequence[RunRecord]) -> dict[str, Any]:
    """The content of ``summary.json``: values in percent, seconds and bytes, as mean and std over seeds."""
    return {**measured(config, records), "environment": environment(config)}


def measured(config: RunConfig, records: Sequence[RunRecord]) -> dict[str, Any]:
    """The summary without the machine, which need not be the one that reads the records.

    Labels without a record are left out; ``zero_shot`` is empty where that is one of them. A value is None where it is
    a mean over nothing (Transfer of a single task), and so is the std of one seed.
    """
    by_label = {label: runs for label, runs in group(config, records).items() if runs}
    methods = {label: _over_seeds([run_values(record) for record in runs]) for label, runs in by_label.items()}
    zero = next((label for label in by_label if config.of(label).method == ZERO_SHOT), "")
    before = methods.get(zero, {})
    return {
        "benchmark": config.benchmark,
        "answers": config.own is not None and config.own.answers,
        "tasks": records[0].tasks,
        "split": config.split,
        "seeds": list(config.seeds),
        "zero_shot": {name: before[name] for name in (*METRICS[:3], "witness") if name in before},
        "methods": {label: values for label, values in methods.items() if label != zero},
        "certificates": {
            label: worst for label, runs in by_label.items() if (worst := worst_certificate(runs)) is not None
        },
        "capacity": {
            label: {"seed": record.seed, **{name: getattr(capacity, name) for name in ROOM}}
            for label, runs in by_label.items()
            if (tightest := tightest_run(runs)) is not None
            for record, capacity in [tightest]
        },
        "settings": {
            label: {
                "method": config.of(label).method,
                "learning_rate": config.of(label).learning_rate,
                **config.of(label).settings,
            }
            for label in by_label
            if label != zero
        },
    }


def worst_certificate(records: Iterable[RunRecord]) -> dict[str, float] | None:
    """The worst figures of all certificates of these runs, or None where the method gives none."""
    certificates = [entry for record in records for entry in record.certificates if entry is not None]
    result: dict[str, float] = {}
    for name, worst in (("leak_after_rounding", max), ("leak", max), ("orthogonality", max), ("captured", min)):
        values = [entry[name] for entry in certificates if entry.get(name) is not None]
        if values:
            result[name] = worst(values)
    return result or None


def group(config: RunConfig, records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Records by label, in the order of the configuration, each list in the order of the seeds."""
    return {label: [record for record in records if record.label == label] for label in config.labels()}


def environment(config: RunConfig) -> dict[str, Any]:
    """Versions, machine, and where the numbers come from."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": config.threads,
        "workers": config.workers,
        "device": torch.cuda.get_device_name() if config.device == "cuda" else "cpu",
        "precision": config.computes_in,
        "peak_bytes": KINDS[config.device],
        "platform": platform.platform(),
        "git_commit": _git_commit(),
    }


def write_summary(config: RunConfig, records: Sequence[RunRecord]) -> dict[str, Any]:
    """Write summary.json, metrics.csv and the accuracy matrices into ``config.out``; returns the summary."""
    out = Path(config.out)
    summary = summarize(config, records)
    rows = [{"method": record.label, "seed": record.seed, **run_values(record)} for record in records]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(out / "metrics.csv", columns, [[row.get(column, "") for column in columns] for row in rows])
    for record in records:
        write_matrix(run_folder(out, record.label, record.seed) / "accuracy.csv", record)
    write_json(out / "summary.json", summary)
    return summary


def write_matrix(path: Path, record: RunRecord) -> None:
    """The accuracy matrix of one run in percent: one row per learned task, the witness last."""
    header = ["after", *record.tasks, *(["witness"] if record.witness else [])]
    rows = []
    for i, row in enumerate(record.accuracy):
        values = [*row, *([record.witness[i]] if record.witness else [])]
        rows.append([record.tasks[i], *(f"{100 * value:.4f}" for value in values)])
    write_csv(path, header, rows)


def _over_seeds(runs: list[dict[str, float | None]]) -> dict[str, dict[str, float | None] | None]:
    """Mean and std of every value that all runs have; None where one of them is undefined."""
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    columns = {name: [value for run in runs if (value := run[name]) is not None] for name in shared}
    return {name: mean_std(column) if len(column) == len(runs) else None for name, column in columns.items()}


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table as CSV, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)

    write_atomic(path, write)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the source tree this package runs from, if it is one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):  # no git here: the commit stays unknown
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
