"""Every Python block of the README and of the documentation pages runs as printed."""

import re
from pathlib import Path

import pytest

from keeplora.methods import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks():
    for page in PAGES:
        for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)):
            yield pytest.param(code, id=f"{page.relative_to(ROOT)}-{i}")


@pytest.mark.parametrize("code", list(blocks()))
def test_python_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    methods = dict(METHODS)
    try:
        exec(compile(code, "<block>", "exec"), {"__name__": "__example__"})
    finally:  # a page may register a method of its own
        METHODS.clear()
        METHODS.update(methods)


def test_the_readme_shows_both_commands_and_an_example():
    readme = PAGES[0].read_text()
    assert "make demo" in readme
    assert "make test" in readme
    assert "```python" in readme
