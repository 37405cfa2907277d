"""The report of a comparison: one table of all methods, as text, Markdown, CSV and JSON, and its charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keeplora.report.capacity import tightest_run
from keeplora.report.drawn import draw_once, shown
from keeplora.report.summary import group, write_csv, write_summary, write_text
from keeplora.train.config import RunConfig
from keeplora.train.record import RunRecord


class Column(NamedTuple):
    """A column of the table: a value of the summary, its title, and how to print it."""

    key: str
    title: str
    digits: int = 1
    factor: float = 1.0
    spread: bool = True


COLUMNS = (
    Column("transfer", "Transfer"),
    Column("avg", "Avg"),
    Column("last", "Last"),
    Column("forgetting", "Forgetting"),
    Column("trainable_parameters", "trained", digits=0, spread=False),
    Column("seconds_per_step", "ms/step", digits=0, factor=1000.0, spread=False),
    Column("switch_seconds", "switch s", spread=False),
    Column("peak_bytes", "peak MB", digits=0, factor=1e-6, spread=False),
    Column("inference_overhead", "inference %", digits=0, spread=False),
)
"""What the table shows; accuracies in percent, mean ± std over seeds."""


ONE_TASK = "One task has neither Transfer nor Forgetting nor BWT, and no chart of them: all need a second task"


def report_comparison(config: RunConfig, records: Sequence[RunRecord], notes: Sequence[str] = ()) -> str:
    """Write every file of the comparison into ``config.out``; returns the table, the notes and where the files are.

    table.md and comparison.csv (a line for every method), summary.json, metrics.csv (a line for every run), an
    accuracy.csv per run, and the charts: last-transfer.png, forgetting.png, matrices.png and an accuracy-<method>.png
    each, capacity.png for the methods that protect a subspace. Charts that show the same already stay as they are.
    """
    out = Path(config.out)
    summary = write_summary(config, records)
    rows = table_rows(summary)
    write_csv(out / "comparison.csv", *csv_rows(summary))
    markdown = "\n".join([markdown_table(rows), "", caption(summary), *(f"\n{note}" for note in notes), ""])
    write_text(out / "table.md", markdown)

    runs = group(config, records)
    tightest = {label: run[1] for label, records in runs.items() if (run := tightest_run(records)) is not None}
    several, said = len(summary["tasks"]) > 1, list(notes)
    if summary["methods"] and not several:
        said.append(ONE_TASK)
    names = ["matrices.png", *(["last-transfer.png", "forgetting.png"] if summary["methods"] and several else [])]
    charts = [out / name for name in (*names, *(["capacity.png"] if tightest else []))]
    matrices = {label: out / f"accuracy-{label}.png" for label in runs}

    def draw() -> None:
        from keeplora.report.comparison_plots import (  # needs matplotlib, and takes time
            plot_forgetting,
            plot_last_against_transfer,
            plot_matrices,
            plot_protected,
        )
        from keeplora.report.plots import plot_matrix

        plot_matrices(charts[0], runs)
        for label, file in matrices.items():
            plot_matrix(file, label, runs[label])
        if summary["methods"] and several:
            plot_last_against_transfer(charts[1], summary)
            plot_forgetting(charts[2], summary, runs)
        plot_protected(charts[-1], tightest)

    draw_once(out, [*charts, *matrices.values()], shown(summary, records), draw)
    lines = [caption(summary), text_table(rows), "", *said]
    return "\n".join([*lines, "charts: " + ", ".join(map(str, charts)), f"numbers: {out / 'table.md'}, summary.json, "
                      "comparison.csv, metrics.csv"])  # fmt: skip


def caption(summary: Mapping[str, Any]) -> str:
    """What the numbers are."""
    seeds = len(summary["seeds"])
    spread = f"mean ± std of {seeds} seeds" if seeds > 1 else "one seed"
    return (
        f"{summary['benchmark']}: {len(summary['tasks'])} tasks, {spread}, accuracy on {summary['split']} in percent; "
        "switch s: all task switches together; inference %: one evaluation against the untouched model's"
    )


def table_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Titles, zero-shot, then every method; an empty cell where nothing was measured."""
    methods = summary["methods"]
    shown = [
        column
        for column in COLUMNS
        if any(column.key in values for values in (summary["zero_shot"], *methods.values()))
    ]
    header = ["method", *(column.title for column in shown)]
    body = [
        [label, *(cell(values, column) for column in shown)]
        for label, values in {"zero-shot": summary["zero_shot"], **methods}.items()
    ]
    return [header, *body]


def cell(values: Mapping[str, Any], column: Column) -> str:
    """What the summary's values have for the column, as it prints it.

    Empty where nothing was measured, "–" where there is nothing to take the mean of.
    """
    if column.key not in values:
        return ""
    value = values[column.key]
    if value is None:
        return "–"
    mean, std = column.factor * value["mean"], column.factor * (value["std"] or 0.0)
    text = f"{mean:,.{column.digits}f}" if column.key != "inference_overhead" else f"{mean:+.{column.digits}f}"
    return f"{text} ± {std:.{column.digits}f}" if column.spread and std else text


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows for a terminal: names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def csv_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Header and a line for every method: mean and std of every value, in the units of summary.json."""
    everything = {"zero-shot": summary["zero_shot"], **summary["methods"]}
    keys = list(dict.fromkeys(key for values in everything.values() for key in values))
    header = ["method", *(f"{key}_{part}" for key in keys for part in ("mean", "std"))]
    rows = [
        [label, *((values.get(key) or {}).get(part, "") for key in keys for part in ("mean", "std"))]
        for label, values in everything.items()
    ]
    return header, rows
