"""The report of fronts: tables as text, Markdown, CSV and JSON, and the chart."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from keeplora._files import write_json
from keeplora.methods.settings import ConfigError
from keeplora.report.comparison import ONE_TASK, markdown_table, text_table
from keeplora.report.drawn import draw_once, shown
from keeplora.report.fronts import ALLOWANCES, LEVEL, Fronts, Point, as_dict, gather
from keeplora.report.summary import write_csv, write_summary, write_text
from keeplora.train.config import RunConfig, override
from keeplora.train.record import RunRecord

_METRICS = {"transfer": "Transfer", "avg": "Avg", "last": "Last"}


def report_fronts(
    config: RunConfig,
    labels: Mapping[str, Sequence[str]],
    records: Sequence[RunRecord],
    notes: Sequence[str] = (),
    *,
    reference: str = "",
) -> str:
    """Write every file of the fronts into ``config.out``; returns the tables, the notes and where the files are.

    fronts.md (a table for each allowance), fronts.csv (a line for every setting), fronts.json (both, and the paired
    tests), fronts.png; summary.json and metrics.csv of all runs. ``reference`` is the method that the others are
    tested against; ``keeplora``, else the first, if empty. A setting whose loss was not finite with some seed is left
    out, and the report says so.
    """
    out = Path(config.out)
    failed = {record.label: record.failed for record in records if record.failed}
    config = override(config, methods=tuple(label for label in config.methods if label not in failed))
    records = [record for record in records if record.label not in failed]
    labels = {method: [one for one in rates if one not in failed] for method, rates in labels.items()}
    labels = {method: rates for method, rates in labels.items() if rates}
    if not labels:
        raise ConfigError(f"report_fronts: records must hold a method that did not diverge, got {', '.join(failed)}")
    summary = write_summary(config, records)
    fronts = gather(config, labels, records, usual_reference(labels, reference))
    values = as_dict(config, fronts)
    write_json(out / "fronts.json", values)
    write_csv(out / "fronts.csv", *_csv_rows(values))
    said = [*findings(fronts, len(config.seeds)), *(f"left out: {label} ({why})" for label, why in failed.items())]
    said += notes
    tables = {allowance_title(allowance): choice_rows(fronts, allowance) for allowance in ALLOWANCES}
    markdown = [caption(config, fronts)]
    for title, rows in tables.items():
        markdown += ["", f"**{title}**", "", markdown_table(rows)]
    write_text(out / "fronts.md", "\n".join([*markdown, *(f"\n{line}" for line in said), ""]))
    drawn = "transfer" in fronts.zero_shot.figures

    def draw() -> None:
        from keeplora.report.fronts_plot import plot_fronts  # needs matplotlib, and takes time

        plot_fronts(out / "fronts.png", config, fronts)

    if drawn:
        draw_once(out, [out / "fronts.png"], [values, *shown(summary, records)], draw)
    text = [caption(config, fronts)]
    for title, rows in tables.items():
        text += ["", title, text_table(rows)]
    chart = f"chart: {out / 'fronts.png'}" if drawn else ONE_TASK
    files = f"{chart}\nnumbers: {out / 'fronts.md'}, fronts.json, fronts.csv, summary.json"
    return "\n".join([*text, "", *said, files])


def usual_reference(labels: Collection[str], wanted: str) -> str:
    """The method that the others are tested against: the one wanted, else keeplora, else the first."""
    choices = (wanted, "keeplora", *labels)
    return next(name for name in choices if name in labels)


def caption(config: RunConfig, fronts: Fronts) -> str:
    """What the numbers are."""
    seeds, others = len(config.seeds), max(len(fronts.points) - 1, 1)
    return (
        f"{config.benchmark}: accuracy on {config.split} in percent ± the error of {seeds} "
        f"seed{'s' if seeds > 1 else ''} and of the test items together; the rate is chosen on validation. "
        f"− {fronts.reference}: the paired difference and the p of one test; of {others} tests, hold p against "
        f"{LEVEL / others:.2g}"
    )


def allowance_title(allowance: float) -> str:
    """What a table of this allowance is called."""
    return f"Transfer may fall {allowance:g} points under zero-shot"


def choice_rows(fronts: Fronts, allowance: float) -> list[list[str]]:
    """Titles, zero-shot, then every method at the rate chosen under this allowance, best Last first."""
    reference = fronts.chosen(fronts.reference, allowance)
    header = ["method", "rate", *_METRICS.values(), f"Last − {fronts.reference}", f"Transfer − {fronts.reference}",
              "earlier data", "trained", "ms/step", "switch s", "peak MB", "inference %"]  # fmt: skip
    rows = [_row("zero-shot", fronts.zero_shot, reference)]
    for method in fronts.ranking(allowance):
        chosen = fronts.chosen(method, allowance)
        mark = "" if fronts.keeps(chosen, allowance) else " †"
        rows.append(_row(method + mark, chosen, reference))
    return [header, *rows]


def _row(name: str, one: Point, reference: Point) -> list[str]:
    figures = [
        f"{one.figures[metric].mean:.1f} ± {one.figures[metric].error:.1f}" if metric in one.figures else "–"
        for metric in _METRICS
    ]
    tests = ["" if one is reference else _test(one, reference, metric) for metric in ("last", "transfer")]
    costs = [""] * 5
    trained = one.costs["trainable_parameters"]
    if trained:
        shown = {"seconds_per_step": (1000, ".0f"), "switch_seconds": (1, ".1f"), "peak_bytes": (1e-6, ",.0f"),
                 "inference_overhead": (1, "+.0f")}  # fmt: skip
        costs = [f"{trained:,.0f}", *(
            "–" if (value := one.costs[name]) is None else f"{factor * value:{form}}"
            for name, (factor, form) in shown.items()
        )]  # fmt: skip
    return [
        name,
        f"{one.rate:g}" if trained else "",
        *figures,
        *tests,
        " and ".join(one.earlier_data) or "none",
        *costs,
    ]


def _test(one: Point, reference: Point, metric: str) -> str:
    if metric not in one.figures:  # one task has no Transfer
        return "–"
    difference = one.less(reference, metric)
    p = "< .001" if difference.p < 0.001 else f"{difference.p:.3f}".lstrip("0")
    return f"{difference.mean:+.1f} ± {difference.error:.1f}, p {p}"


def findings(fronts: Fronts, seeds: int) -> list[str]:
    """What a reader of the tables should know, one sentence each."""
    lines = []
    if any(not fronts.keeps(fronts.chosen(m, allowance), allowance) for m in fronts.points for allowance in ALLOWANCES):
        lines.append("† Transfer on validation is below the allowance at the rate chosen")
    small, large = ALLOWANCES
    pairs = fronts.reversals(small, large)
    if fronts.ranking(small) == fronts.ranking(large):
        lines.append(f"The ranking by Last is the same under both allowances, {small:g} and {large:g} points")
    else:
        count = len(fronts.points) * (len(fronts.points) - 1) // 2
        sure = [f"{a} and {b}" for (a, b), significant in pairs.items() if significant]
        lines.append(
            f"Between the allowances {small:g} and {large:g} {len(pairs)} of {count} pairs of methods change places in "
            f"Last ({', '.join(f'{a} and {b}' for a, b in pairs)}); significantly so under both (p < {LEVEL:g}): "
            f"{', '.join(sure) or 'none'}"
        )
    for allowance in ALLOWANCES:
        for edge, methods in fronts.edges(allowance).items():
            if methods:
                lines.append(f"At the {edge} rate tried (allowance {allowance:g}), a better one may lie beyond: "
                             f"{', '.join(methods)}")  # fmt: skip
    if seeds < 2:
        lines.append("One seed: the errors count the test items alone, and the rates are chosen on one run each")
    return lines


def _csv_rows(values: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """A line for every setting: where it stands on both splits, what it costs, and which allowances choose it."""
    costs = ["trainable_parameters", "seconds_per_step", "switch_seconds", "peak_bytes", "inference_overhead"]
    parts = [(metric, part) for metric in _METRICS for part in ("mean", "error")]
    header = ["method", "learning_rate", "validation_transfer", "validation_last",
              *(f"{metric}_{part}" for metric, part in parts), "on_front", "chosen_at_allowance", *costs,
              "earlier_data"]  # fmt: skip
    rows = []
    for method, points in {"zero-shot": [values["zero_shot"]], **values["methods"]}.items():
        for one in points:
            chosen = [
                a for a, choices in values["chosen"].items() if choices.get(method, {}).get("label") == one["label"]
            ]
            rows.append([
                method, one["learning_rate"], one["validation"].get("transfer", ""), one["validation"]["last"],
                *(one["test"].get(metric, {}).get(part, "") for metric, part in parts), one.get("on_front", ""),
                " ".join(chosen),
                *(one[name] for name in costs), " ".join(one["earlier_data"]),
            ])  # fmt: skip
    return header, rows
