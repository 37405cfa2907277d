"""One HTML file about one or several run folders, readable without a network, on a phone and on paper."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from keeplora._version import __version__
from keeplora.methods.settings import ConfigError
from keeplora.report.page.read import Run, read_run
from keeplora.report.summary import write_text

__all__ = ["page_html", "write_page"]


def write_page(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page about these run folders, whole or not at all; returns where it is.

    Args:
        folders: What ``keeplora run``, ``demo`` and ``compare`` have written, finished or not. They are only read.
        out: The file; None for ``report.html`` in the folder, or, of several, in the current one.

    Raises:
        ConfigError: a folder is none of a run, or jinja2 or matplotlib is not installed.
        StateError: a result is damaged.
        OSError: the file cannot be written.
    """
    needed = {"jinja2": "jinja2", "matplotlib": "matplotlib", "scipy": "scipy"}
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"report: {', '.join(missing)} must be installed for a page, got none. Run pip install 'keeplora[demo]'."
        )
    runs = [read_run(folder) for folder in folders]
    if out is None:
        out = runs[0].folder / "report.html" if len(runs) == 1 else "report.html"
    write_text(Path(out), page_html(runs))
    return Path(out)


def page_html(runs: Sequence[Run]) -> str:
    """The page. Names and settings are escaped, whoever chose them."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # optional, as matplotlib is

    from keeplora.report.page.overview import comparison_part, names_of, overview_part, terms_part
    from keeplora.report.page.sections import run_part

    named = dict(zip(names_of([run.folder for run in runs]), runs, strict=True))
    shared = (overview_part(named), comparison_part(named), terms_part(named))
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
