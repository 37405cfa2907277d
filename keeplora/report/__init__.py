"""Tables and charts of a finished benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keeplora.report.capacity import plot_capacity, tightest_run
from keeplora.report.comparison import ONE_TASK
from keeplora.report.summary import group, write_summary, write_text
from keeplora.report.table import result_table
from keeplora.train.config import RunConfig
from keeplora.train.record import RunRecord


def report_run(config: RunConfig, records: Sequence[RunRecord]) -> str:
    """Write every file of the report into ``config.out``; returns the table and where the files are.

    summary.json, metrics.csv, an accuracy.csv per run, demo.png (the comparison), accuracy-<method>.png, and for
    methods that protect a subspace capacity.png and capacity.txt, of the seed with the least room.
    """
    from keeplora.report.plots import plot_comparison, plot_matrix  # needs matplotlib

    out = Path(config.out)
    summary = write_summary(config, records)
    runs = group(config, records)
    chart = out / "demo.png"
    if summary["methods"]:
        plot_comparison(chart, summary, runs)
    for label, label_records in runs.items():
        plot_matrix(out / f"accuracy-{label}.png", label, label_records)
    tightest = {label: run for label, records in runs.items() if (run := tightest_run(records)) is not None}
    room = {f"{label}, seed {record.seed}": capacity for label, (record, capacity) in tightest.items()}
    lines = [result_table(summary), ""]
    lines += [f"room left by {title}: {capacity.summary}" for title, capacity in room.items()]
    if plot_capacity(out / "capacity.png", room, records[0].tasks):
        tables = "\n\n".join(f"{title}\n{capacity}" for title, capacity in room.items()) + "\n"
        write_text(out / "capacity.txt", tables)
        lines.append(f"room: {out / 'capacity.png'}, {out / 'capacity.txt'}")
    if len(summary["tasks"]) == 1:
        lines.append(ONE_TASK)
    return "\n".join([*lines, f"chart: {chart}", f"numbers: {out / 'summary.json'}"])
