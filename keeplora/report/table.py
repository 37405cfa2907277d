"""The result of a benchmark as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_METRICS = (("transfer", "Transfer"), ("avg", "Avg"), ("last", "Last"), ("forgetting", "Forgetting"),
            ("learn", "Learned"), ("witness", "Witness"))  # fmt: skip

_OF_ANSWERS = (("transfer", "Transfer"), ("mft", "MFT"), ("mfn", "MFN"), ("maa", "MAA"), ("bwt", "BWT"),
               ("witness", "Witness"))  # fmt: skip
"""For models that answer: what the instruction benchmarks report."""


def result_table(summary: Mapping[str, Any]) -> str:
    """A table of ``summary.json`` for the terminal, percentages as mean ± std over seeds."""
    metrics = _OF_ANSWERS if summary.get("answers") else _METRICS
    present = [(key, title) for key, title in metrics if all(key in row for row in summary["methods"].values())]
    header = ["", *(title for _, title in present), "train s", "switch s", "leak"]
    zero = [
        "zero-shot",
        *(_percent(summary["zero_shot"][key]) if key in summary["zero_shot"] else "" for key, _ in present),
        "", "", "",
    ]  # fmt: skip
    rows = [header, zero]
    for label, values in summary["methods"].items():
        certificate = summary["certificates"].get(label, {})
        leak = certificate.get("leak_after_rounding", certificate.get("leak"))  # the factors' where nothing is merged
        rows.append([
            label,
            *(_percent(values[key]) for key, _ in present),
            f"{values['train_seconds']['mean']:.0f}",
            f"{values['switch_seconds']['mean']:.1f}",
            "" if leak is None else f"{leak:.0e}",
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    seeds, tasks = len(summary["seeds"]), len(summary["tasks"])
    caption = (
        f"{summary['benchmark']}: {tasks} tasks, {seeds} seed{'s' if seeds > 1 else ''}, "
        f"accuracy on {summary['split']} in percent (mean ± std)"
    )
    return "\n".join([caption, lines[0], "─" * max(map(len, lines)), *lines[1:]])


def _percent(value: Mapping[str, float] | None) -> str:
    if value is None:  # a mean over nothing
        return "–"
    return f"{value['mean']:.1f} ± {value['std']:.1f}" if value["std"] else f"{value['mean']:.1f}"
