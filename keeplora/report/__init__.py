"""Tables and charts of a finished benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keeplora.report.capacity import plot_capacity, tightest_run
from keeplora.report.comparison import ONE_TASK
from keeplora.report.drawn import draw_once, shown
from keeplora.report.summary import group, write_summary, write_text
from keeplora.report.table import result_table
from keeplora.train.config import RunConfig
from keeplora.train.record import RunRecord


def report_run(config: RunConfig, records: Sequence[RunRecord]) -> str:
    """Write every file of the report into ``config.out``; returns the table and where the files are.

    summary.json, metrics.csv, an accuracy.csv per run, demo.png (the comparison), accuracy-<method>.png, and for
    methods that protect a subspace capacity.png and capacity.txt, of the seed with the least room. Charts that are
    there already and show the same are not drawn again.
    """
    out = Path(config.out)
    summary = write_summary(config, records)
    runs = group(config, records)
    tightest = {label: run for label, records in runs.items() if (run := tightest_run(records)) is not None}
    room = {f"{label}, seed {record.seed}": capacity for label, (record, capacity) in tightest.items()}
    chart, room_chart = out / "demo.png", out / "capacity.png"
    matrices = {label: out / f"accuracy-{label}.png" for label in runs}

    def draw() -> None:
        from keeplora.report.plots import plot_comparison, plot_matrix  # needs matplotlib, and takes time

        if summary["methods"]:
            plot_comparison(chart, summary, runs)
        for label, file in matrices.items():
            plot_matrix(file, label, runs[label])
        plot_capacity(room_chart, room, records[0].tasks)

    charts = [*([chart] if summary["methods"] else []), *matrices.values(), *([room_chart] if room else [])]
    draw_once(out, charts, shown(summary, records), draw)
    lines = [result_table(summary), ""]
    lines += [f"room left by {title}: {capacity.summary}" for title, capacity in room.items()]
    if room:
        tables = "\n\n".join(f"{title}\n{capacity}" for title, capacity in room.items()) + "\n"
        write_text(out / "capacity.txt", tables)
        lines.append(f"room: {room_chart}, {out / 'capacity.txt'}")
    if len(summary["tasks"]) == 1:
        lines.append(ONE_TASK)
    return "\n".join([*lines, f"chart: {chart}", f"numbers: {out / 'summary.json'}"])
