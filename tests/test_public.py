"""What users are told to import comes from few places, is there, and loads optional packages when it is used."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from types import ModuleType

import pytest
from pages import FOR_CONTRIBUTORS, PAGES, PUBLIC, ROOT, blocks, fences, imported
from test_api_page import resolve

import keeplora
import keeplora.integrations

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LAZY = {
    keeplora: {"KeepLoraCallback": "transformers", "plot_capacity": "matplotlib"},
    keeplora.integrations: {"KeepLoraCallback": "transformers", "shard": "accelerate"},
}


def named(path):
    return str(path.relative_to(ROOT))


def codes(path):
    return [path.read_text()] if path.suffix == ".py" else [code for _, code in blocks(path)]


def strangers(path):
    """Imports from keeplora that are not from a public place, or lead nowhere."""
    places = PUBLIC + (FOR_CONTRIBUTORS if path.name.startswith("add-a") else ())
    own = {
        f"keeplora.{room}.{name}" for room, name in (("ops", "row_energies"), ("families", "acme"), ("tasks", "waves"))
    }
    for code in codes(path):
        for module, name in imported(code):
            if module in own and path.name.startswith("add-a"):
                continue
            if module not in places:
                yield f"{module} is no public place"
            elif name is not None and not resolves(module, name) and f"{module}.{name}" not in own:
                yield f"{module} has no {name} in __all__"


def resolves(module, name):
    """Whether a name is public: of a public place in ``__all__``, or a public place itself."""
    found = importlib.import_module(module)
    if f"{module}.{name}" in PUBLIC:
        return True
    return hasattr(found, name) and (module in FOR_CONTRIBUTORS or name in found.__all__)


@pytest.mark.parametrize(
    "path", [path for path in (*PAGES, *EXAMPLES) if any(map(list, map(imported, codes(path))))], ids=named
)
def test_what_pages_and_examples_import_is_public(path):
    assert list(strangers(path)) == []


def test_what_pages_use_of_keeplora_itself_is_public():
    """``keeplora.create(…)`` after ``import keeplora``."""
    used = {
        node.attr
        for path in (*PAGES, *EXAMPLES)
        for code in codes(path)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "keeplora"
    }
    assert "KeepLora" in used
    assert used <= {*keeplora.__all__, *(place.split(".")[1] for place in PUBLIC[1:])}


def text_of(page):
    """The page without its blocks of code."""
    text = page.read_text()
    for _, _, code in fences(text):
        text = text.replace(code, "")
    return text


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=named)
def test_names_in_the_text_of_a_page_exist(page):
    """What is renamed or moves must be found everywhere: dotted names and files in code spans and links."""
    spans = re.findall(r"`([^`\n]+)`|\]\(([^)#\s]+)", text_of(page))
    words = [word for span in spans for word in re.findall(r"[\w./+-]+", "".join(span)) if "NAME" not in word]
    dotted = [word.strip(".") for word in words if re.match(r"keeplora(\.\w+)+$", word.strip("."))]
    gone = [name for name in dotted if not name.endswith(".md") and name not in NOT_OURS and not exists(name)]
    folders = ("bench", "csrc", "docs", "examples", "keeplora", "tests", "tools")
    files = [word.rstrip(".") for word in words if word.split("/")[0] in folders and "/" in word]
    gone += [name for name in files if not (ROOT / name).exists() and name not in NOT_OURS]
    assert gone == []


NOT_OURS = {"tests/test_custom_models.py", "keeplora.lock", "keeplora.json"}
"""PEFT's, the end of a lock's name, and a file in an export."""


def exists(name):
    try:
        resolve(name)
    except (AttributeError, ModuleNotFoundError):
        return False
    return True


@pytest.mark.parametrize("place", PUBLIC)
def test_every_public_name_is_there(place):
    module = importlib.import_module(place)
    assert len(set(module.__all__)) == len(module.__all__) > 0
    for name in module.__all__:
        assert not isinstance(getattr(module, name), ModuleType) or place == "keeplora.ops", name
        assert name in dir(module)
    assert inspect.getdoc(module)


def test_the_names_of_the_issue_come_from_keeplora_itself():
    from keeplora import METHODS, KeepLora, KeepLoraCallback, create, find_targets

    assert KeepLoraCallback is keeplora.integrations.KeepLoraCallback
    assert METHODS["keeplora"].build is KeepLora
    assert callable(create)
    assert callable(find_targets)


def test_type_checkers_see_what_is_loaded_later():
    """The names in ``if TYPE_CHECKING`` are the lazy ones, from the same modules."""
    for module in LAZY:
        tree = ast.parse(inspect.getsource(module))
        (guard,) = [
            node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ]
        seen = {alias.name for node in guard.body for alias in node.names}
        lazy = {key.value for node in ast.walk(guard.orelse[0]) if isinstance(node, ast.Dict) for key in node.keys}
        assert seen == lazy
        assert set(LAZY[module]) <= seen <= set(module.__all__)
        for node in guard.body:
            origin = importlib.import_module("." * node.level + node.module, module.__name__)
            assert all(getattr(origin, alias.name) is getattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize(
    ("module", "name", "package"), [(m, name, package) for m, names in LAZY.items() for name, package in names.items()]
)
def test_a_missing_package_is_named_with_its_command(module, name, package, monkeypatch):
    getattr(module, name)
    monkeypatch.delitem(vars(module), name)  # as before it was asked for
    monkeypatch.setitem(sys.modules, package, None)  # as Python has it for what cannot be imported
    with pytest.raises(ImportError, match=rf"{module.__name__}\.{name}: {package} must .* Run pip install .*{package}"):
        getattr(module, name)
    assert name not in dir(module)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'keeplora' has no attribute 'KeepLoar'"):
        keeplora.KeepLoar  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'KeepLoar'"):
        from keeplora import KeepLoar  # noqa: F401


def test_rooms_load_no_optional_package():
    """Each public place as its first import, but those named after a library; the tasks of open_clip included."""
    places = [place for place in PUBLIC if not place.endswith((".accelerate", ".lightning"))]
    code = (
        f"import importlib, sys; [importlib.import_module(place) for place in {places!r}]; "
        "from keeplora.tasks import benchmarks; benchmarks(); "
        "late = {'open_clip', 'peft', 'transformers', 'matplotlib', 'tensorboard', 'timm'} & set(sys.modules); "
        "assert not late, late"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("from keeplora.methods.gpm import Gpm", "keeplora.methods.gpm is no public place"),
        ("import keeplora.train.loop", "keeplora.train.loop is no public place"),
        ("from keeplora.tasks import Splitt", "keeplora.tasks has no Splitt"),
        ("from keeplora.lora import host", "keeplora.lora has no host"),
    ],
)
def test_a_private_place_is_noticed(code, complaint, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"```python\n{code}\n```\n")
    assert any(complaint in each for each in strangers(page))
