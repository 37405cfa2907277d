"""The parts of the page that belong to one run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keeplora.report.capacity import tightest_run
from keeplora.report.comparison import ONE_TASK, Column, cell
from keeplora.report.comparison_plots import last_against_transfer
from keeplora.report.page.blocks import Block, Cell, Chart, Folded, Part, Table, Terms, Text, cells, heat, table
from keeplora.report.page.front import Rates, front_blocks, rates_of
from keeplora.report.page.published import published
from keeplora.report.page.read import Run
from keeplora.report.plots import curves_figure
from keeplora.report.style import svg
from keeplora.report.summary import METRICS, group
from keeplora.train.config import ZERO_SHOT
from keeplora.train.record import RunRecord

__all__ = ["CERTIFICATE", "COSTS", "TERMS", "metric_columns", "run_part", "state_of"]

TERMS = {
    "transfer": ("Transfer", "Accuracy on tasks that are not yet learned: what is left of the zero-shot ability."),
    "avg": ("Avg", "Mean accuracy over all tasks and all times."),
    "last": ("Last", "Mean accuracy over all tasks after the last one: what is known in the end."),
    "forgetting": ("Forgetting", "How far a task falls from its best accuracy to its last, mean over tasks."),
    "learn": ("Learn", "Accuracy on a task right after it is learned, mean over tasks."),
    "witness": ("Witness", "Accuracy at the end on a task that is never trained."),
    "witness_avg": ("Witness, all times", "The same, mean over the whole course."),
}
COSTS = {
    Column("train_seconds", "train s"): "Seconds in optimizer steps, all tasks together.",
    Column("switch_seconds", "switch s"): "Seconds of what the method does before and after tasks, all together.",
    Column("evaluate_seconds", "evaluate s"): (
        "Seconds in evaluations, all together; – where some of them were known from a run before."
    ),
    Column("seconds_per_step", "ms/step", digits=0, factor=1000.0, spread=False): "Milliseconds of an optimizer step.",
    Column("peak_bytes", "peak MB", digits=0, factor=1e-6, spread=False): (
        "Most memory held at a time, in 10⁶ bytes: of the process on a CPU, of torch on a GPU."
    ),
    Column("trainable_parameters", "trained", digits=0, spread=False): "Most parameters trained in a task.",
    Column("inference_overhead", "inference %", digits=0, spread=False): (
        "How much longer an evaluation takes than with the untouched model; a tenth is noise."
    ),
}
CERTIFICATE = {
    "leak_after_rounding": (
        "leak",
        "Share of the stored weights' change in protected directions, ‖ΔW Q‖ / ‖ΔW‖; 0 is best.",
        ".1e",
    ),
    "leak": ("leak, factors", "The same of the trained update, before it was merged and rounded.", ".1e"),
    "orthogonality": ("orthogonality", "How far the protected directions are from orthonormal, max |QᵀQ − I|.", ".1e"),
    "captured": ("captured", "Share of a task's feature energy inside the protected directions; 1 is all.", ".4f"),
}


def run_part(run: Run, name: str, title: str) -> Part:
    """Everything about one folder; ``name`` begins the ids of its parts."""
    summary = run.summary()
    if summary is None:
        return Part(name, title, [Text(state_of(run), warning=True)], [_settings(run, name)])
    runs = {label: records for label, records in group(run.config, run.records).items() if records}
    rates = rates_of(run)
    makers: Sequence[Callable[[], Part | None]] = (
        lambda: _results(run, summary, runs, name, scatter=rates is None),
        lambda: _fronts(rates, name),
        lambda: _course(summary, runs, name, rates),
        lambda: _matrices(summary, runs, name),
        lambda: _capacity(runs, name),
        lambda: _certificates(summary, name),
        lambda: _costs(summary, runs, name),
        lambda: published(run.config.benchmark, f"{name}-published"),
        lambda: _settings(run, name),
        lambda: _environment(run, name),
    )
    parts = [part for make in makers if (part := make()) is not None]
    return Part(name, title, _notes(run), parts)


def state_of(run: Run) -> str:
    """Whether everything is finished, in a sentence."""
    ended = len(run.records) + len(run.failed)
    all_runs = ended + len(run.begun) + len(run.waiting) + run.lost
    unread = f" {run.lost} cannot be read." if run.lost else ""
    if not run.unfinished:
        return f"Finished: {ended} of {all_runs} runs.{unread}"
    begun = f" {len(run.begun)} more {'has' if len(run.begun) == 1 else 'have'} begun." if run.begun else ""
    return f"Unfinished: {ended} of {all_runs} runs have ended.{begun}{unread} All numbers are of those that have."


def _notes(run: Run) -> list[Block]:
    notes: list[Block] = [Text(state_of(run), warning=run.unfinished or bool(run.lost))]
    notes += [
        Text(f"Left out: {one.label}, seed {one.seed}, which ended early: {one.failed}", warning=True)
        for one in run.failed
    ]
    if run.strangers:
        names = ", ".join(run.strangers)
        notes.append(Text(f"Not shown: runs of {names}, which the folder holds and its config.json does not name."))
    if not any(run.config.of(record.label).method == ZERO_SHOT for record in run.records):
        notes.append(Text("No run of the untouched model has ended yet: charts that need it are left out."))
    if run.unfinished:
        waiting = {"begun": run.begun, "not begun": run.waiting}
        rows = [["method", "seed", "state"], *([a, str(b), state] for state, to in waiting.items() for a, b in to)]
        notes.append(Folded("Runs that have not ended", [table("Runs that have not ended", rows)]))
    return notes


def metric_columns(summary: Mapping[str, Any]) -> list[Column]:
    """The columns of accuracies: all metrics, and the witness where there is one."""
    values = [summary["zero_shot"], *summary["methods"].values()]
    names = [*METRICS, *(name for name in ("witness", "witness_avg") if any(name in one for one in values))]
    return [Column(name, TERMS[name][0] if name in TERMS else name.replace("_", " ")) for name in names]


def _lines(summary: Mapping[str, Any], runs: Mapping[str, Sequence[RunRecord]]) -> dict[str, Mapping[str, Any]]:
    """The values of every label with a finished run, the untouched model first."""
    zero = [label for label in runs if label not in summary["methods"]]
    return {**dict.fromkeys(zero, summary["zero_shot"]), **summary["methods"]}


def _seeds(runs: Mapping[str, Sequence[RunRecord]], label: str) -> str:
    return ", ".join(str(record.seed) for record in runs[label])


def _results(
    run: Run, summary: Mapping[str, Any], runs: Mapping[str, Sequence[RunRecord]], name: str, *, scatter: bool
) -> Part:
    columns = metric_columns(summary)
    several = len(run.config.seeds) > 1
    spread = "mean ± standard deviation over seeds" if several else "one seed"
    rows = [["method", *(column.title for column in columns), *(["seeds"] if several else [])]]
    for label, values in _lines(summary, runs).items():
        figures = [cell(values, column) or "–" for column in columns]
        rows.append([label, *figures, *([_seeds(runs, label)] if several else [])])
    caption = f"Accuracy on the {summary['split']} split in percent, {spread}"
    blocks: list[Block] = [table(caption, rows)]
    if len(summary["tasks"]) == 1:
        blocks.append(Text(f"{ONE_TASK}."))
    elif scatter and summary["zero_shot"] and summary["methods"]:
        figure = last_against_transfer(summary, size=(7.6, 5.6), titled=False)
        blocks.append(Chart("Last against Transfer: up and to the right is better", svg(figure, f"{name}-scatter")))
    return Part(f"{name}-results", "Results", blocks)


def _course(
    summary: Mapping[str, Any], runs: Mapping[str, Sequence[RunRecord]], name: str, rates: Rates | None
) -> Part | None:
    if not (summary["zero_shot"] and summary["methods"]):
        return None
    drawn, which = summary, ""
    if rates is not None and (chosen := rates.chosen()):
        drawn = {**summary, "methods": {label: summary["methods"][label] for label in chosen}}
        which = "; each method at the rate chosen on validation, with the larger allowance"
    bands = "; bands: ± 1 standard deviation over seeds" if len(summary["seeds"]) > 1 else ""
    caption = f"Mean accuracy over all tasks, learned or not, after each task{bands}{which}"
    rows = [["method", *(f"+ {task}" for task in summary["tasks"])]]
    for label, records in runs.items():
        course = 100 * np.mean([np.mean(record.accuracy, axis=1) for record in records], axis=0)
        rows.append([label, *(f"{value:.1f}" for value in course)])
    numbers = table("Mean accuracy over all tasks after each task, in percent", rows)
    blocks: list[Block] = [
        Chart(caption, svg(curves_figure(drawn, runs), f"{name}-curves")),
        Folded("The same in numbers", [numbers]),
    ]
    return Part(f"{name}-course", "Over the course of learning", blocks)


def _fronts(rates: Rates | None, name: str) -> Part | None:
    return None if rates is None else Part(f"{name}-fronts", "Fronts over learning rates", front_blocks(rates, name))


def _matrices(summary: Mapping[str, Any], runs: Mapping[str, Sequence[RunRecord]], name: str) -> Part:
    tasks = summary["tasks"]
    folded = []
    for label, records in runs.items():
        matrix = 100 * np.mean([record.accuracy for record in records], axis=0)
        witness = 100 * np.mean([record.witness for record in records], axis=0) if records[0].witness else None
        head = [Cell(""), *cells(tasks), *([Cell("witness (never trained)")] if witness is not None else [])]
        rows = []
        for i, task in enumerate(tasks):
            row = [Cell(f"after {task}")]
            row += [heat(v, f"{v:.1f}", "new" if i == j else "old" if j < i else "") for j, v in enumerate(matrix[i])]
            row += [] if witness is None else [heat(witness[i], f"{witness[i]:.1f}")]
            rows.append(row)
        seeds = f"mean of {len(records)} seeds" if len(records) > 1 else f"seed {records[0].seed}"
        caption = f"{label}: accuracy (%) on each task (column) after each task (row), {seeds}"
        title = f"{label}: Last {matrix[-1].mean():.1f}"
        folded.append(Folded(title, [Table(caption, [head], rows, "heat")], open=len(runs) <= 3))
    how = (
        "Bold: right after the task is learned. Left of the stairs and below: learned before, so a fall is forgetting. "
        "Right of them and above: not yet seen, so a fall is lost zero-shot ability. Darker is more accurate."
    )
    return Part(f"{name}-matrices", "Accuracy matrices", [Text(how), *folded])


def _capacity(runs: Mapping[str, Sequence[RunRecord]], name: str) -> Part | None:
    tightest = {label: found for label, records in runs.items() if (found := tightest_run(records)) is not None}
    if not tightest:
        return None
    blocks = {label: capacity.by_depth() for label, (_, capacity) in tightest.items()}
    places = sorted({place for one in blocks.values() for place in one}, key=lambda p: (p[0] != "vision", *p))
    rows = []
    for place in places:
        row = [Cell(f"{place[0]} {place[1]}")]
        for one in blocks.values():
            share = 100 * (1 - one[place].free_share) if place in one else None
            row.append(Cell("–") if share is None else heat(share, f"{share:.0f}"))
        rows.append(row)
    caption = "Protected share (%) of the input space of adapted layers after the last task, by tower and depth"
    shown: list[Block] = [
        Text("Of each method the seed with the least room. What is protected, later tasks cannot change."),
        Table(caption, [[Cell("tower, depth"), *cells(blocks)]], rows, "heat"),
    ]
    for label, (record, capacity) in tightest.items():
        full = ", ".join(f"{x.name} ({x.free} of {x.in_features} free)" for x in capacity.tightest())
        inner = [Text(f"{capacity.summary}."), Text(f"Fill first: {full}.")]
        by_depth = [[" ".join(row[:2]), *row[2:]] for row in capacity.rows()]
        shown.append(Folded(f"{label}, seed {record.seed}", [*inner, table(f"{label}: directions by depth", by_depth)]))
    return Part(f"{name}-capacity", "Capacity", shown)


def _certificates(summary: Mapping[str, Any], name: str) -> Part | None:
    found = summary["certificates"]
    if not found:
        return None
    shown = [key for key in CERTIFICATE if any(key in values for values in found.values())]
    rows = [["method", *(CERTIFICATE[key][0] for key in shown)]]
    for label, values in found.items():
        rows.append([label, *(f"{values[key]:{CERTIFICATE[key][2]}}" if key in values else "–" for key in shown)])
    terms = Terms([CERTIFICATE[key][:2] for key in shown])
    caption = "Retention certificates: the worst layer of all tasks and seeds"
    return Part(f"{name}-certificates", "Certificates", [table(caption, rows), terms])


def _costs(summary: Mapping[str, Any], runs: Mapping[str, Sequence[RunRecord]], name: str) -> Part | None:
    if not summary["methods"]:
        return None
    rows = [["method", *(column.title for column in COSTS), "earlier data"]]
    for label, values in summary["methods"].items():
        earlier = sorted({kind for record in runs[label] for kind in record.earlier_data})
        figures = [cell(values, column) or "–" for column in COSTS]
        rows.append([label, *figures, " and ".join(earlier) or "none"])
    terms = [(column.title, text) for column, text in COSTS.items()]
    terms.append(("earlier data", "What the method looked at again of tasks before: training or validation data."))
    return Part(f"{name}-costs", "Costs", [table("What a run costs, mean over seeds", rows), Terms(terms)])


def _settings(run: Run, name: str) -> Part:
    shared = {key: value for key, value in run.config.as_dict().items() if key not in ("method", "methods", "seeds")}
    shared["seeds"] = list(run.config.seeds)
    rows = [["setting", "value"], *([key, spelled(value)] for key, value in shared.items())]
    methods = [["label", "method", "learning rate", "weight decay", "its own settings"]]
    for label in run.config.labels():
        entry = run.config.of(label)
        decay = run.config.weight_decay if entry.weight_decay is None else entry.weight_decay
        trains = entry.method != ZERO_SHOT
        own = ", ".join(f"{key} = {spelled(value)}" for key, value in entry.settings.items()) or "defaults"
        rate = [f"{entry.learning_rate:g}", f"{decay:g}", own] if trains else ["–"] * 3
        methods.append([label, entry.method, *rate])
    blocks = [table("Settings of every method", methods, "text"), table("Shared settings", rows, "text")]
    return Part(f"{name}-settings", "Settings", [Folded("Settings of methods, and what they share", blocks)])


def _environment(run: Run, name: str) -> Part:
    facts = dict(run.environment or {})
    packages = facts.pop("packages", {})
    rows = [["", "as the run recorded it"], *([key.replace("_", " "), spelled(value)] for key, value in facts.items())]
    rows += [[package, spelled(version)] for package, version in dict(packages).items()]
    for one in run.versions:
        rows.append(["the folder was run with", spelled(one)])
    blocks: list[Table | Chart | Text | Terms] = [table("Environment", rows, "text")]
    if run.environment is None:
        blocks.insert(0, Text("The machine is recorded when the run is finished; until then only versions are."))
    return Part(f"{name}-environment", "Environment", [Folded("Versions and machine", blocks)])


def spelled(value: Any) -> str:
    """A value of JSON as a reader writes it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {spelled(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(spelled, value)) or "none"
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value)
