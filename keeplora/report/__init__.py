"""Tables and charts of a finished benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keeplora.report.summary import group, write_summary
from keeplora.report.table import result_table
from keeplora.train.checkpoint import RunRecord
from keeplora.train.config import RunConfig


def report_run(config: RunConfig, records: Sequence[RunRecord]) -> str:
    """Write every file of the report into ``config.out``; returns the table and where the files are.

    summary.json, metrics.csv, an accuracy.csv per run, demo.png (the comparison), accuracy-<method>.png and
    capacity.png (methods that protect a subspace).
    """
    from keeplora.report.plots import plot_capacity, plot_comparison, plot_matrix  # needs matplotlib

    out = Path(config.out)
    summary = write_summary(config, records)
    runs = group(config, records)
    chart = out / "demo.png"
    if summary["methods"]:
        plot_comparison(chart, summary, runs)
    for label, label_records in runs.items():
        plot_matrix(out / f"accuracy-{label}.png", label, label_records)
    plot_capacity(out / "capacity.png", runs)
    return f"{result_table(summary)}\n\nchart: {chart}\nnumbers: {out / 'summary.json'}"
