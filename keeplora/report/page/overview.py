"""The parts of the page that belong to all run folders together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keeplora.report.comparison import cell
from keeplora.report.page.blocks import Block, Cell, Part, Table, Terms, Text, cells, table
from keeplora.report.page.read import Run
from keeplora.report.page.sections import TERMS, metric_columns, spelled, state_of

__all__ = ["comparison_part", "damage_part", "names_of", "overview_part", "terms_part"]

_APART = ("method", "methods", "seeds", "out", "benchmark", "workers", "tensorboard", "trackers", "keep_states",
          "reuse_evaluations")  # fmt: skip


def names_of(folders: Sequence[Path]) -> list[str]:
    """What the page calls the folders: their last component, or the whole path where two have the same one."""
    short = [folder.resolve().name for folder in folders]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]


def damage_part(runs: Mapping[str, Run], unreadable: Sequence[str]) -> Part | None:
    """What cannot be read, by name; None where there is nothing of the kind."""
    told = [*unreadable, *(f"{name}: {one}" for name, run in runs.items() for one in run.damaged)]
    if not told:
        return None
    first = Text(f"{len(told)} of what these folders hold cannot be read. The page is made of the rest.", warning=True)
    return Part("damaged", "What cannot be read", [first, *(Text(one, warning=True) for one in told)])


def overview_part(runs: Mapping[str, Run]) -> Part:
    """What was run: a column for every folder."""
    rows = [["", *runs]]
    facts: dict[str, list[str]] = {}
    for run in runs.values():
        config = run.config
        tasks = run.records[0].tasks if run.records else []
        given = config.epochs if config.steps is None else config.steps
        numbers = ", ".join(map(str, given)) if isinstance(given, tuple) else given
        length = f"{numbers} {'epochs' if config.steps is None else 'steps'}"
        one = {
            "folder": str(run.folder),
            "state": state_of(run),
            "benchmark": config.benchmark,
            "tasks, in order": f"{len(tasks)}: {', '.join(tasks)}" if tasks else "not known before a run has ended",
            "accuracy on": f"{config.split} split",
            "seeds": spelled(config.seeds),
            "methods": ", ".join(config.labels()),
            "training of a task": f"{length} in batches of {config.batch_size}",
            "device and precision": f"{config.device}, {config.computes_in}",
        }
        for key, value in one.items():
            facts.setdefault(key, []).append(value)
    rows += [[key, *values] for key, values in facts.items()]
    return Part(
        "what", "What was run", [table("A column for each run folder" if len(runs) > 1 else "The run", rows, "text")]
    )


def terms_part(runs: Mapping[str, Run]) -> Part:
    """A line for every accuracy of the page."""
    summaries = [summary for run in runs.values() if (summary := run.summary()) is not None]
    shown = dict.fromkeys(column.key for summary in summaries for column in metric_columns(summary))
    return Part("terms", "What the numbers mean", [Terms([TERMS[key] for key in shown if key in TERMS])])


def comparison_part(runs: Mapping[str, Run]) -> Part | None:
    """Transfer, Avg and Last of all folders in one table, and what differs between them; None for a single folder."""
    summaries = {name: summary for name, run in runs.items() if (summary := run.summary()) is not None}
    if len(runs) < 2 or not summaries:
        return None
    columns = metric_columns(next(iter(summaries.values())))[:3]
    lines = {
        name: {"untouched model": summary["zero_shot"], **summary["methods"]} for name, summary in summaries.items()
    }
    labels = dict.fromkeys(label for one in lines.values() for label in one)
    head = [
        [Cell(""), *(Cell(name, "group", columns=len(columns)) for name in summaries)],
        cells(["method", *(column.title for _ in summaries for column in columns)]),
    ]
    rows = []
    for label in labels:
        row = [label]
        for one in lines.values():
            row += [cell(one.get(label, {}), column) or "–" for column in columns]
        rows.append(cells(row))
    blocks: list[Block] = [Text(text, warning=True) for text in _warnings(runs, summaries)]
    blocks.append(Table("Accuracy in percent, mean ± standard deviation over seeds", head, rows))
    differing = _differing(runs)
    if len(differing) > 1:
        blocks.append(table("Settings that differ between the runs", differing, "text"))
    return Part("comparison", "The runs side by side", blocks)


def _warnings(runs: Mapping[str, Run], summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = []
    for key, what in (("benchmark", "benchmarks"), ("tasks", "tasks, or another order of them"), ("split", "splits")):
        if len({str(summary[key]) for summary in summaries.values()}) > 1:
            found.append(f"The runs are on different {what}: do not compare their numbers with each other.")
    found += [f"{name}: {state_of(run)}" for name, run in runs.items() if run.unfinished]
    return found


def _differing(runs: Mapping[str, Run]) -> list[list[str]]:
    settings = [{k: v for k, v in run.config.as_dict().items() if k not in _APART} for run in runs.values()]
    rows = [["setting", *runs]]
    for key in settings[0]:
        values = [spelled(one[key]) for one in settings]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return rows
