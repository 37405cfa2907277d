"""One HTML file about one or several run folders, readable without a network, on a phone and on paper."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from keeplora._version import __version__
from keeplora.methods.settings import ConfigError
from keeplora.methods.state import StateError
from keeplora.report.page.read import Run, read_run
from keeplora.report.summary import write_text

__all__ = ["Written", "page_html", "write_page"]


class Written(NamedTuple):
    """Where the page is, and what it could not show: a sentence for each result or file that cannot be read."""

    file: Path
    damaged: list[str]


def write_page(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> Written:
    """Write the page about these run folders, whole or not at all, from all that can be read of them.

    Args:
        folders: What ``keeplora run``, ``demo`` and ``compare`` have written, finished or not. They are only read.
        out: The file; None for ``report.html`` in the folder, or, of several, in the current one.

    Raises:
        ConfigError: a folder is none of a run, or jinja2 or matplotlib is not installed.
        StateError: the settings of every folder are damaged.
        OSError: the file cannot be written.
    """
    needed = {"jinja2": "jinja2", "matplotlib": "matplotlib", "scipy": "scipy"}
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"report: {', '.join(missing)} must be installed for a page, got none. Run pip install 'keeplora[demo]'."
        )
    runs, unreadable = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except StateError as error:
            unreadable.append(error)
    if not runs:
        raise unreadable[0]
    if out is None:
        out = Path(folders[0]) / "report.html" if len(folders) == 1 else "report.html"
    lost = [*map(str, unreadable), *(told for run in runs for told in run.damaged)]
    write_text(Path(out), page_html(runs, [str(error) for error in unreadable]))
    return Written(Path(out), lost)


def page_html(runs: Sequence[Run], unreadable: Sequence[str] = ()) -> str:
    """The page; ``unreadable`` says of further folders why they are not in it.

    Names and settings are escaped, whoever chose them.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # optional, as matplotlib is

    from keeplora.report.page.overview import comparison_part, damage_part, names_of, overview_part, terms_part
    from keeplora.report.page.sections import run_part

    named = dict(zip(names_of([run.folder for run in runs]), runs, strict=True))
    shared = (damage_part(named, unreadable), overview_part(named), comparison_part(named), terms_part(named))
    parts = [part for part in shared if part is not None]
    parts += [run_part(run, f"run-{i + 1}", f"Run {name}") for i, (name, run) in enumerate(named.items())]
    environment = Environment(
        loader=PackageLoader("keeplora.report.page", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    benchmarks = list(dict.fromkeys(run.config.benchmark for run in runs))
    return environment.get_template("page.html.j2").render(
        title=f"{', '.join(benchmarks)}: what is learned, what is kept ({', '.join(named)})",
        heading=f"{', '.join(benchmarks)}: what is learned, what is kept",
        version=__version__,
        parts=parts,
    )
