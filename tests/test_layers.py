"""The import law: a room may import rooms below it, never one beside or above it; no module is in a circle.

`cli → report → compare → train → integrations, tasks, plan → methods → statistics, families → lora → math → ops`
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    "cli", "report", "compare", "train", "integrations|tasks|plan", "methods", "statistics|families", "lora", "math",
    "ops",
]  # fmt: skip
PLACE = {room: place for place, rooms in enumerate(ORDER) for room in rooms.split("|")}
# Leaves import no room. Who may import them:
LEAVES = {
    "_version": set(PLACE),
    "_calls": {*PLACE, "_messages", "distributed"},
    "_names": {*PLACE, "_calls", "_messages"},
    "_messages": {*PLACE, "_files"},
    "_files": {*PLACE, "_made_of"},
    "_made_of": set(PLACE),
    "_untrusted": set(PLACE),
    "_hub": set(PLACE),
    "_lazy": set(PLACE),
    "_arguments": {"cli"},
    "distributed": {"train", "integrations", "methods"},
}


def module_of(path: Path, root: Path = ROOT) -> str:
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported(source: str, module: str, package: bool = False):
    """``module.name`` of everything a file imports, at any depth of nesting; what only type checkers read is left out.

    Relative imports are resolved against ``module``, which is a ``package`` if the file is its ``__init__``.
    """
    tree = ast.parse(source)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = node.level - (1 if package else 0)
            base = parts[: len(parts) - above] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str | None:
    """The room of a dotted name in the package: ``keeplora.lora.host`` is in lora."""
    parts = name.split(".")
    return parts[1] if parts[0] == "keeplora" and len(parts) > 1 else None


def violations(source: str, module: str, package: bool = False):
    room = room_of(module)
    for name in imported(source, module, package):
        other = room_of(name)
        if other is None or other == room:
            continue
        if other in LEAVES:
            if room not in LEAVES[other]:
                yield f"{room} imports {other}"
        elif room in LEAVES:
            yield f"{room} imports {other}, but is a leaf"
        elif other not in PLACE:
            yield f"{room} imports {other}, which is no room"
        elif PLACE[other] <= PLACE[room]:
            yield f"{room} imports {other}"


def files():
    """Every file of the package but its own ``__init__`` and ``__main__``, with its module's name."""
    for path in sorted((ROOT / "keeplora").rglob("*.py")):
        module = module_of(path)
        if module not in ("keeplora", "keeplora.__main__"):
            yield path, module


def test_imports_point_down():
    broken = []
    for path, module in files():
        room = room_of(module)
        assert room in PLACE or room in LEAVES, f"{path.relative_to(ROOT)} is in no room"
        broken += [f"{module}: {what}" for what in violations(path.read_text(), module, path.stem == "__init__")]
    assert not broken, "\n".join(broken)


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other (strongly connected components of more than one, or of a loop)."""
    reach: dict[str, set[str]] = {}
    for start in imports:
        seen, todo = set(), list(imports[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += imports.get(name, ())
        reach[start] = seen
    groups = {frozenset({a, *(b for b in reach[a] if a in reach.get(b, ()))}) for a in imports if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def test_no_module_is_in_a_circle():
    """Not even behind an import inside a function."""
    sources = {module: (path.read_text(), path.stem == "__init__") for path, module in files()}
    imports = {}
    for module, (source, package) in sources.items():
        names = imported(source, module, package)
        modules = {name if name in sources else name.rpartition(".")[0] for name in names}
        imports[module] = (modules & set(sources)) - {module}
    assert circles(imports) == []


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"e"}, "f": set()}
    assert circles(graph) == [["a", "b", "c"], ["e"]]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("keeplora.ops.gram", "from keeplora.math.rank import fewest_directions"),
        ("keeplora.math.rank", "def late():\n    import keeplora.lora"),
        ("keeplora.lora.host", "from keeplora import methods"),
        ("keeplora.methods.gpm", "from keeplora.train.loop import run"),
        ("keeplora.methods.gpm", "from keeplora.integrations import peft"),
        ("keeplora.families.timm", "from keeplora.statistics.passes import evaluating"),
        ("keeplora.integrations.hf_trainer", "from keeplora.tasks.workload import Workload"),
        ("keeplora.math.rank", "from ..lora import wrap"),
        ("keeplora.methods.keeplora.method", "from ...train import loop"),
        ("keeplora.lora.host", "import keeplora.helpers"),
        ("keeplora.lora.host", "from keeplora.distributed import processes"),
        ("keeplora.distributed", "from keeplora.lora import wrap"),
        ("keeplora._files", "from keeplora.methods.method import State"),
    ],
)
def test_the_law_sees_a_broken_import(module, source):
    assert list(violations(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("keeplora.cli", "from keeplora.ops import gram"),
        ("keeplora.lora.host", "import torch"),
        ("keeplora.tasks.classification", "from keeplora.methods import State"),
        ("keeplora.methods.method", "from keeplora.distributed import processes"),
        ("keeplora.ops.gram", "from keeplora._version import __version__"),
        (
            "keeplora.methods.keeplora.method",
            "from ..lora_method import LoraMethod\nfrom .config import KeepLoraConfig",
        ),
        ("keeplora.lora.forward", "if TYPE_CHECKING:\n    from keeplora.methods import Method"),
    ],
)
def test_the_law_lets_a_right_import_pass(module, source):
    assert not list(violations(source, module))


def test_one_file_knows_torch_distributed():
    spelled = (
        "torch.distributed",
        "import torch.distributed",
        "from torch.distributed",
        "from torch import distributed",
    )
    kinds = (ast.Import, ast.ImportFrom, ast.Attribute)
    for path in (ROOT / "keeplora").rglob("*.py"):
        used = [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
        assert any(text.startswith(spelled) for text in used) == (path.name == "distributed.py"), path


def test_kernels_do_not_know_torch():
    files = [path for path in (ROOT / "csrc" / "kernels").rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        text = path.read_text()
        assert not any(word in text for word in ("<torch/", "<ATen/", "<c10/", "<<<")), path


def test_files_stay_readable():
    for folder in ("keeplora", "csrc", "tests", "bench", "tools", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                assert len(path.read_text().splitlines()) <= 400, f"{path.relative_to(ROOT)} is over 400 lines"


def test_importing_keeplora_touches_no_gpu_and_no_optional_library():
    import subprocess
    import sys

    code = (
        "import sys, torch, keeplora; "
        "assert not torch.cuda.is_initialized(); "
        "late = {'open_clip', 'peft', 'transformers', 'matplotlib', 'tensorboard'} & set(sys.modules); "
        "assert not late, late"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
