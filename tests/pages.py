"""Runs the Python blocks of a documentation page as its reader would, from top to bottom.

Most blocks are executed, in one namespace. A block whose first line is the name of a file, ``# my_tasks.py``, is that
file: it is written and can be imported by later blocks. Files of the package, ``# keeplora/families/acme.py``, become a
part of it. ``# in keeplora/ops/__init__.py`` adds lines to a file that is there. Afterwards everything is as before.
"""

import ast
import importlib
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

import keeplora.families
import keeplora.ops
import keeplora.ops.declare
import keeplora.tasks
from keeplora.families import FAMILIES
from keeplora.methods import METHODS
from keeplora.ops.declare import NAMESPACE, OPS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PUBLIC = (
    "keeplora",
    "keeplora.families",
    "keeplora.integrations",
    "keeplora.integrations.accelerate",
    "keeplora.integrations.lightning",
    "keeplora.lora",
    "keeplora.math",
    "keeplora.methods",
    "keeplora.ops",
    "keeplora.statistics",
    "keeplora.tasks",
    "keeplora.tasks.clip_b16",
    "keeplora.tasks.embedded",
    "keeplora.tasks.field",
    "keeplora.tasks.minilm",
    "keeplora.tasks.own",
    "keeplora.tasks.scoring",
)
"""Places that users import from. Each has ``__all__``, and the API reference has every name in it."""
FOR_CONTRIBUTORS = (
    "keeplora.families._blocks",
    "keeplora.ops.check",
    "keeplora.ops.declare",
    "keeplora.tasks.sequence",
    "keeplora.tasks.workload",
)
"""What files of the package are made with besides: in the pages that add one."""
NOT_RUN = "# not run in CI: "
ROOMS = (keeplora.families, keeplora.ops, keeplora.tasks)
"""Those that a page may add a file to."""


def fences(text):
    """(language as written, line, code) of every fenced block."""
    for match in re.finditer(r"^( *)```([^\n`]*)\n(.*?)^\1```", text, re.M | re.S):
        yield match[2].strip(), text[: match.start()].count("\n") + 2, match[3]


def blocks(page):
    """(line, code) of the Python blocks."""
    return [(line, code) for language, line, code in fences(page.read_text()) if language == "python"]


def file_of(code):
    """(where the block belongs, whether that file is there already); (None, False) for a block that is executed."""
    match = re.match(r"# (in )?([\w/]+\.py)\b.*\n", code)
    return (None, False) if match is None else (match[2], bool(match[1]))


def files(page):
    """The files that a page shows, by name."""
    shown = ((file_of(code), code) for _, code in blocks(page))
    return {name: code for (name, there), code in shown if name is not None and not there}


def imported(code):
    """(module, name or None) of every import from keeplora in a block."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "keeplora")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "keeplora":
            yield from ((node.module, alias.name) for alias in node.names)


@contextmanager
def running(page, folder):
    """Run the page in ``folder``, and give the names of its blocks, while what it made is still there."""
    with _as_before(folder):
        names = {"__name__": "__page__"}
        for line, code in blocks(page):
            compiled = compile("\n" * (line - 1) + code, str(page), "exec")  # errors name the page's line
            place, there = file_of(code)
            if code.startswith(NOT_RUN):
                continue
            if place is None:
                exec(compiled, names)
            elif there:
                exec(compiled, vars(importlib.import_module(module_of(place))))
            else:
                _write(folder / place, code)
        yield names


def module_of(place):
    return place.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _write(file, code):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)
    importlib.invalidate_caches()
    if file.parent.name == "families":  # read when Python starts
        FAMILIES[:] = keeplora.families._files()


@contextmanager
def _as_before(folder):
    """Whatever the page registers, imports or adds to the package is gone again at the end."""
    registries = {id(kept): (kept, kept.copy()) for kept in (METHODS, FAMILIES, OPS, sys.path, keeplora.ops.__all__)}
    paths = [(room.__path__, list(room.__path__)) for room in ROOMS]
    public = [(vars(room), dict(vars(room))) for room in ROOMS]
    modules = set(sys.modules)
    library = keeplora.ops.declare._library
    keeplora.ops.declare._library = torch.library.Library(NAMESPACE, "FRAGMENT")  # what a page declares is its own
    sys.path.insert(0, str(folder))
    for room in ROOMS:
        room.__path__.append(str(folder / room.__name__.replace(".", "/")))
    try:
        yield
    finally:
        keeplora.ops.declare._library._destroy()
        keeplora.ops.declare._library = library
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
        for names, before in public:
            for name in set(names) - set(before):
                del names[name]
        for kept, before in paths:
            kept[:] = before
        for kept, before in registries.values():
            kept.clear()
            kept.update(before) if isinstance(kept, dict) else kept.extend(before)
