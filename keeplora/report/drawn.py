"""Charts that are drawn once: drawing them takes most of a report's time, and a report is often printed again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keeplora._files import sha256, write_json
from keeplora._made_of import made_of
from keeplora._untrusted import MOST_JSON, parse_json, read_bytes
from keeplora.train.record import RunRecord

__all__ = ["draw_once", "shown"]

FILE = "charts.json"


def shown(summary: Mapping[str, Any], records: Sequence[RunRecord]) -> list[Any]:
    """What charts of these runs show: all figures, and nothing of the machine that draws them."""
    return [{**summary, "environment": None}, *map(asdict, records)]


def draw_once(out: Path, charts: Sequence[Path], shows: Any, draw: Callable[[], None]) -> None:
    """Call ``draw``, which writes ``charts``, unless they are there and show the same; charts.json in ``out`` tells.

    A chart that is gone or changed is drawn again, and so are all with another keeplora or matplotlib.

    Args:
        out: The folder of the report.
        charts: Every file that ``draw`` writes.
        shows: What they show, as JSON takes it.
        draw: Called without arguments.
    """
    key = made_of(("matplotlib", "numpy"), (), json.dumps(shows))
    if _known(out / FILE) == {"shows": key, "charts": _hashes(out, charts)}:
        return
    draw()
    write_json(out / FILE, {"shows": key, "charts": _hashes(out, charts)})


def _hashes(out: Path, charts: Sequence[Path]) -> dict[str, str]:
    return {os.path.relpath(chart, out): sha256(chart) for chart in charts if chart.is_file()}


def _known(file: Path) -> Any:
    """What the file says; None where it cannot be read: the charts are drawn again."""
    try:
        return parse_json(read_bytes(file, most=MOST_JSON))
    except (OSError, ValueError):
        return None
