"""The API reference holds every public name."""

import ast
import importlib
import re
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
PACKAGES = ["keeplora", "keeplora.integrations", "keeplora.lora", "keeplora.math", "keeplora.methods", "keeplora.ops"]


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
    body = ast.parse(Path(module.__file__).read_text()).body
    for node, after in pairwise([*body, None]):
        names = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        yield from (name for name in names if not name.startswith("_"))


def shown(page):
    """Every object the page shows: what it names, and what is defined in the modules it names."""
    objects = []
    for path in re.findall(r"^::: (\S+)$", page, re.M):
        found = resolve(path)
        objects.append(found)
        if isinstance(found, ModuleType):  # mkdocstrings shows what a module defines, not what it imports
            objects += [getattr(found, name) for name in defined(found)]
    return {id(value) for value in objects}


def missing(page):
    there = shown(page)
    for name in PACKAGES:
        package = importlib.import_module(name)
        for public in package.__all__:
            value = getattr(package, public)
            if isinstance(value, ModuleType):  # an op and its module share a name
                value = getattr(value, public)
            if public != "__version__" and id(value) not in there:
                yield f"{name}.{public}"


def test_every_public_name_is_in_the_reference():
    assert not list(missing(PAGE.read_text()))


@pytest.mark.parametrize(
    "line", ["::: keeplora.KeepLora\n", "::: keeplora.ops.gram.gram\n", "::: keeplora.methods.method\n"]
)
def test_a_name_that_is_left_out_is_noticed(line):
    page = PAGE.read_text()
    assert line in page
    assert list(missing(page.replace(line, "")))
