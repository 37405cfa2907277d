"""What others have published on a benchmark: rows of keeplora/report/published, by the benchmark's name."""

from __future__ import annotations

import json
from importlib import resources

from keeplora.report.page.blocks import Part, Text, table

__all__ = ["published"]


def published(benchmark: str, name: str) -> Part | None:
    """The rows of the file whose ``benchmarks`` hold this name; None where there is none."""
    folder = resources.files("keeplora.report") / "published"
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if not file.name.endswith(".json"):
            continue
        values = json.loads(file.read_text(encoding="utf-8"))
        if benchmark in values["benchmarks"]:
            rows = [["method", "Transfer", "Avg", "Last", "protocol", "source"]]
            for row in values["rows"]:
                figures = [f"{row[key]:.1f}" for key in ("transfer", "avg", "last")]
                rows.append([row["method"], *figures, row["protocol"], row["source"]])
            warning = (
                "Protocols differ: prompts, splits, augmentation and training length are not those of the runs above, "
                "nor the same in every row. A difference of some points need not be one of the methods."
            )
            return Part(name, f"Published on {values['title']}", [Text(warning), table(values["title"], rows, "mixed")])
    return None
