"""What mkdocs asks of this site: the version in its head, notebooks as pages, and warnings that mkdocs does not know.

`mkdocs build --strict` fails on a warning. Besides its own there is one for markup that no reader should see, and one
for a public member of the API reference without a docstring.
"""

import logging
import re
import runpy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
RAW = re.compile(r":[a-z]+:`|(?<!:)::\s*$|\.\. [a-z-]+::|>\s*>\s*>", re.M)
"""Roles, directives, literal blocks and doctests that were not understood."""
log = logging.getLogger("mkdocs.hooks.site")


def on_startup(**_: Any) -> None:
    """`--quiet` would drop the warnings that `--strict` counts."""
    logger = logging.getLogger("mkdocs")
    logger.setLevel(min(logger.level, logging.WARNING))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    version = runpy.run_path(str(ROOT / "keeplora" / "_version.py"))["__version__"]
    config.site_name = f"{config.site_name} {version}"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Each notebook is a page beside it, with the outputs that it was saved with."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        place = Path(notebook.src_uri)
        text, resources = MarkdownExporter().from_filename(
            notebook.abs_src_path, resources={"output_files_dir": f"{place.stem}_files"}
        )
        files.append(File.generated(config, str(place.with_suffix(".md")), content=text))
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, str(place.parent / name), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """A link to a notebook, which GitHub shows, leads to its page here."""
    for path in re.findall(r"^::: (\S+)$", markdown, re.M):
        for member in undocumented(path, Path(config.config_file_path).parent):
            log.warning("%s: %s has no docstring", page.file.src_uri, member)
    return re.sub(r"(\]\([^)\s]+)\.ipynb\b", r"\1.md", markdown)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Code aside, none of the text may look like reStructuredText; doctests outside of code are quotations."""
    text = re.sub(r"<(pre|script|style)\b.*?</\1>", "", html, flags=re.S)
    text = re.sub(r"<code\b.*?</code>", "`", text, flags=re.S).replace("<blockquote>", "\0")
    text = re.sub(r"<[^>]*>", "", text).replace("\0", ">")
    for match in RAW.finditer(text):
        where = " ".join(text[max(0, match.start() - 40) : match.end() + 40].split())
        log.warning("%s: markup is shown as it is: %s", page.file.src_uri, where)
    return html


def undocumented(path: str, folder: Path) -> list[str]:
    """Public classes, functions and methods at or below ``path`` that no docstring explains, be it a base's."""
    name, _, rest = path.partition(".")
    package = _package(name, folder)
    found = package[rest] if rest else package
    return list(_undocumented(found.final_target if found.is_alias else found))


@cache
def _package(name: str, folder: Path) -> Any:
    return griffe.load(name, search_paths=[folder])


def _undocumented(found: Any) -> Iterator[str]:
    if found.docstring is None and not _explained_by_a_base(found):
        yield found.path
    if not (found.is_module or found.is_class):
        return
    for name, member in found.members.items():
        shown = not name.startswith("_") and not member.is_alias and not member.is_module
        if shown and (member.is_class or member.is_function or "property" in member.labels):
            yield from _undocumented(member)


def _explained_by_a_base(found: Any) -> bool:
    if found.parent is None or not found.parent.is_class:
        return False
    return any(found.name in base.members and base.members[found.name].docstring for base in found.parent.mro())
