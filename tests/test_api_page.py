"""The API reference holds every public name, and nothing that is not public or a detail of something public."""

import ast
import importlib
import inspect
import re
from itertools import pairwise
from types import ModuleType

import pytest
from pages import PUBLIC, ROOT

from keeplora.methods import METHODS

PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
DETAILS = {
    "keeplora.distributed",
    "keeplora.families.class_head",
    "keeplora.families.class_tokens",
    "keeplora.families.open_clip",
    "keeplora.families.transformers",
    "keeplora.math.lowrank",
    "keeplora.math.moment",
    "keeplora.math.orthonormal",
    "keeplora.math.rank",
    "keeplora.math.subspace",
    "keeplora.methods.capacity",
    "keeplora.methods.lora_method",
    "keeplora.methods.method",
    "keeplora.methods.published",
    "keeplora.methods.saved",
    "keeplora.methods.settings",
}
"""Modules that the pages show more of than users import. Files and folders of the methods are too."""


def reference():
    """The text of all pages of the reference."""
    return "\n".join(path.read_text() for path in PAGES)


def resolve(path):
    """What a dotted path means: modules as far as they go, then attributes."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(path)


def defined(module):
    """Public names that the module's own statements define; of constants those with a docstring, as in the page."""
    body = ast.parse(inspect.getsource(module)).body
    for node, after in pairwise([*body, None]):
        names = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        yield from (name for name in names if not name.startswith("_"))


def shown(page):
    """(path, its module, object) of all that the page shows: what it names, and what the modules it names define."""
    for path in re.findall(r"^::: (\S+)$", page, re.M):
        found = resolve(path)
        yield path, path if isinstance(found, ModuleType) else path.rpartition(".")[0], found
        if isinstance(found, ModuleType):  # mkdocstrings shows what a module defines, not what it imports
            yield from ((f"{path}.{name}", path, getattr(found, name)) for name in defined(found))


def public():
    """(path, object) of every name in ``__all__`` of the public places."""
    for place in PUBLIC:
        module = importlib.import_module(place)
        yield place, module
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, ModuleType):  # an op and its module share a name
                value = getattr(value, name)
            if name != "__version__":
                yield f"{place}.{name}", value


def missing(page):
    there = {id(value) for _, _, value in shown(page)}
    return [path for path, value in public() if not isinstance(value, ModuleType) and id(value) not in there]


def strangers(page):
    known = {id(value) for _, value in public()}
    constants = {f"{place}.{name}" for place in PUBLIC for name in defined(importlib.import_module(place))}
    folders = {part.__module__ for entry in METHODS.values() for part in (entry.build, entry.config)}
    folders |= {name.removesuffix(".method") for name in folders}
    for path, module, value in shown(page):
        of_a_method = module in folders or module.rpartition(".")[0] in folders
        if id(value) not in known and module not in DETAILS and not of_a_method and path not in constants:
            yield path


def test_every_public_name_is_in_the_reference():
    assert missing(reference()) == []


def test_everything_in_the_reference_is_public():
    assert list(strangers(reference())) == []


@pytest.mark.parametrize(
    "line",
    [
        "::: keeplora.KeepLora\n",
        "::: keeplora.KeepLoraCallback\n",
        "::: keeplora.ops.gram.gram\n",
        "::: keeplora.methods.method\n",
        "::: keeplora.tasks.minilm\n",
    ],
)
def test_a_name_that_is_left_out_is_noticed(line):
    page = reference()
    assert line in page
    assert missing(page.replace(line, ""))


@pytest.mark.parametrize("path", ["keeplora.train.loop", "keeplora.lora.host", "keeplora.ops.check.matrix"])
def test_a_private_name_is_noticed(path):
    assert path in list(strangers(f"::: {path}\n"))


def test_every_name_is_on_one_page():
    """So that its anchor is one, and what is new finds its area."""
    paths = re.findall(r"^::: (\S+)$", reference(), re.M)
    assert len(paths) > 150
    assert sorted(path for path in set(paths) if paths.count(path) > 1) == []


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "api" / "index.md").read_text()
    assert sorted(re.findall(r"\]\((\S+\.md)\)", index)) == sorted(path.name for path in PAGES if path.stem != "index")
