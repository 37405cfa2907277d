"""The part of the page about a comparison over learning rates."""

from __future__ import annotations

from dataclasses import dataclass

from keeplora.report.comparison import ONE_TASK
from keeplora.report.fronts import ALLOWANCES, Fronts, gather
from keeplora.report.fronts_plot import fronts_figure
from keeplora.report.fronts_table import allowance_title, caption, choice_rows, findings, usual_reference
from keeplora.report.page.blocks import Block, Chart, Folded, Text, table
from keeplora.report.page.read import Run
from keeplora.report.style import svg
from keeplora.train.config import ZERO_SHOT, RunConfig, override
from keeplora.train.config_checks import BOTH

__all__ = ["Rates", "front_blocks", "rates_of"]


@dataclass(frozen=True, eq=False)
class Rates:
    """The fronts of a run, the settings that are in them, and the labels that are not."""

    fronts: Fronts | None
    config: RunConfig
    absent: list[str]

    def chosen(self) -> list[str]:
        """The label of each method at the rate that validation chooses under the larger allowance."""
        return [] if self.fronts is None else [self.fronts.chosen(m, ALLOWANCES[-1]).label for m in self.fronts.points]


def rates_of(run: Run) -> Rates | None:
    """Fronts of the labels whose seeds have all ended; None where the run is no comparison over learning rates."""
    config = run.config
    if config.evaluate_on != BOTH:
        return None
    failed = {record.label for record in run.failed}
    whole = [
        label
        for label in config.labels()
        if label not in failed and sum(record.label == label for record in run.records) == len(config.seeds)
    ]
    absent = [label for label in config.labels() if label not in whole]
    trained = [label for label in whole if config.of(label).method != ZERO_SHOT]
    methods: dict[str, list[str]] = {label.rpartition("@")[0] or label: [] for label in trained}
    for label in sorted(trained, key=lambda one: config.of(one).learning_rate):
        methods[label.rpartition("@")[0] or label].append(label)
    kept = override(config, methods=tuple(one for one in config.methods if one in whole) or config.methods)
    if not trained or len(trained) == len(whole):
        return Rates(None, kept, absent)
    records = [record for record in run.records if record.label in whole]
    return Rates(gather(kept, methods, records, usual_reference(methods, run.reference)), kept, absent)


def front_blocks(rates: Rates, name: str) -> list[Block]:
    """Chart and tables of fronts; ``name`` begins the ids of the chart."""
    said: list[Block] = []
    if rates.absent:
        names = ", ".join(rates.absent)
        said.append(Text(f"Without {names}: not all seeds have ended, or one has failed.", warning=True))
    fronts = rates.fronts
    if fronts is None:
        return [*said, Text("Fronts need the untouched model and a method with all their seeds, which are to come.")]
    if "transfer" in fronts.zero_shot.figures:
        figure = fronts_figure(rates.config, fronts, size=(8.6, 6.4), titled=False, numbers="the table of results")
        said.append(Chart("Transfer against Last over learning rates", svg(figure, f"{name}-front")))
    else:
        said.append(Text(f"{ONE_TASK}."))
    said.append(Text(f"{caption(rates.config, fronts)}."))
    said += [Text(f"{line}.") for line in findings(fronts, len(rates.config.seeds))]
    for i, allowance in enumerate(ALLOWANCES):
        title = allowance_title(allowance)
        said.append(Folded(title, [table(title, choice_rows(fronts, allowance))], open=i == 0))
    return said
