"""Every Python block of the README and of the documentation pages runs, page by page and from top to bottom.

A block that cannot run here, because it downloads weights or needs a GPU, says so to the reader in its first line:
``# not run in CI: …``. It must compile, and it must contain the line that is the reason.
"""

import ast
import importlib.util
import re

import pages
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from pages import NOT_RUN, PAGES, ROOT, blocks, fences

REASONS = (
    "pretrained=",
    "from_pretrained(",
    "cuda",
    "load_dataset(",
    "hf_hub_download(",
    "read_images(",
    "read_instructions(",
    "fully_shard(",
    "integrations.shard(",
)


def named(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=named)
def test_the_python_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    for state in (AcceleratorState, GradientState, PartialState):  # a reader's process has had no other Accelerator
        state._reset_state()
    monkeypatch.chdir(tmp_path)
    with pages.running(page, tmp_path):
        pass


def test_blocks_that_are_not_run_have_their_reason_in_them():
    for page in PAGES:
        for line, code in blocks(page):
            if NOT_RUN in code:
                assert code.startswith(NOT_RUN), f"{page}:{line}: the remark must be the block's first line"
                statements = ast.unparse(ast.parse(code))
                assert any(reason in statements for reason in REASONS), f"{page}:{line}: nothing here needs {REASONS}"


def test_code_is_in_fences_that_are_run():
    """A block in ``py`` or ``Python``, or a fence with a typing error, would never be looked at."""
    for page in PAGES:
        for language, line, code in fences(page.read_text()):
            assert language in ("", "python", "sh", "toml", "json"), f"{page}:{line}: unknown language {language!r}"
            if language == "":
                assert not re.search(r"^(import|from) \w+", code, re.M), f"{page}:{line}: Python without a language"


def test_commands_in_the_documentation_name_modules_that_exist():
    pattern = r"\b(?:python -m |`)((?:examples|bench|tools)(?:\.\w+)+)"
    modules = {name for page in PAGES for name in re.findall(pattern, page.read_text())}
    assert "examples.plain_pytorch" in modules
    for name in modules - {"bench.NOTES", "bench.gpu.sh"}:
        assert importlib.util.find_spec(name), name


def test_the_readme_shows_both_commands_and_an_example():
    readme = PAGES[0].read_text()
    assert "make demo" in readme
    assert "make test" in readme
    assert "```python" in readme


@pytest.mark.parametrize(
    ("text", "test"),
    [
        ("```python\nx = 1  # not run in CI: no reason\n```\n", test_blocks_that_are_not_run_have_their_reason_in_them),
        ("```python\n# not run in CI: laziness\nx = 1\n```\n", test_blocks_that_are_not_run_have_their_reason_in_them),
        ("```\nimport torch\n```\n", test_code_is_in_fences_that_are_run),
        ("```py\nx = 1\n```\n", test_code_is_in_fences_that_are_run),
    ],
)
def test_a_page_that_escapes_is_noticed(text, test, tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text(text)
    monkeypatch.setitem(globals(), "PAGES", [tmp_path / "page.md"])
    with pytest.raises(AssertionError):
        test()
