"""The README is short and its numbers are those of the results; the page of dependencies names every one of them."""

import json
import re
import tomllib

import pytest
from pages import ROOT

from keeplora import METHODS

README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = {"full fine-tuning": "full", "LoRA": "lora", "KeepLoRA": "keeplora", "KeepLoRA++": "keeplora++"}


def rows():
    """The result rows of the README: label, then Transfer, Avg, Last."""
    for line in README.splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if len(cells) == 5 and re.fullmatch(r"[\d.]+", cells[1]):
            yield cells[0], tuple(cells[1:4])


def test_the_readme_is_read_in_a_few_minutes():
    assert len(README.encode()) <= 6 * 1024


def test_the_readme_tells_the_results_that_are_on_file():
    results = json.loads((ROOT / "bench" / "results" / "cpu" / "demo.json").read_text())
    on_file = {"zero-shot": results["zero_shot"]} | {label: results["methods"][name] for label, name in ROWS.items()}
    expected = {
        label: tuple(f"{metrics[name]['mean']:.1f}" for name in ("transfer", "avg", "last"))
        for label, metrics in on_file.items()
    }
    assert dict(rows()) == expected


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lists = [project["build-system"]["requires"], project["project"]["dependencies"]]
    lists += project["project"]["optional-dependencies"].values()
    names = {re.match(r"[\w.-]+", requirement)[0] for wanted in lists for requirement in wanted}
    return sorted(names - {"keeplora"})


@pytest.mark.parametrize("name", requirements())
def test_a_dependency_is_there_for_a_reason(name):
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    first_cells = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("|"))
    assert name in re.split(r"[,\s]+", first_cells)


def test_how_many_other_methods_there_are_is_said_alike():
    others = [name for name in METHODS if not name.startswith("keeplora")]
    for page in (README, (ROOT / "docs" / "index.md").read_text(encoding="utf-8")):
        assert re.findall(r"(\d+) other\s+methods", page) == [str(len(others))]
