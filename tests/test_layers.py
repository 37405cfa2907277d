"""The import law: each room may import the rooms to its right, never to its left; kernels do not know torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["cli", "report", "train", "tasks|methods", "integrations", "lora", "math", "ops", "_C"]
PLACE = {room: place for place, rooms in enumerate(ORDER) for room in rooms.split("|")}
LEAVES = {"_version": set(PLACE), "distributed": {"train", "methods"}}  # who may import them; they import no room


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "keeplora").parts[0].removesuffix(".py")


def imported_rooms(source: str, room: str):
    """Rooms that a file of ``room`` imports, at any depth of nesting, by full name or relatively."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "keeplora" else [node.module]
            )
        elif isinstance(node, ast.ImportFrom) and node.level > 1:
            yield f"<a relative import out of {room}>"
        for name in names:
            parts = (name or "").split(".")
            if parts[0] == "keeplora" and len(parts) > 1:
                yield parts[1]


def violations(source: str, room: str):
    for other in imported_rooms(source, room):
        if other == room:
            continue
        if other in LEAVES:
            if room not in LEAVES[other]:
                yield f"{room} imports {other}"
        elif room in LEAVES:
            yield f"{room} imports {other}, but is a leaf"
        elif other not in PLACE:
            yield f"{room} imports {other}, which is no room"
        elif room in PLACE and PLACE[other] < PLACE[room]:
            yield f"{room} imports {other}"


def test_imports_point_right():
    broken = []
    for path in sorted((ROOT / "keeplora").rglob("*.py")):
        room = room_of(path)
        if room in ("__init__", "__main__"):
            continue
        assert room in PLACE or room in LEAVES, f"{path.relative_to(ROOT)} is in no room"
        broken += [f"{path.relative_to(ROOT)}: {what}" for what in violations(path.read_text(), room)]
    assert not broken


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("ops", "from keeplora.math.rank import fewest_directions"),
        ("math", "def late():\n    import keeplora.lora"),
        ("lora", "from keeplora import methods"),
        ("methods", "from keeplora.train.loop import run"),
        ("integrations", "from keeplora.tasks.base import Task"),
        ("train", "from keeplora.report import plots"),
        ("math", "from ..lora import wrap"),
        ("lora", "import keeplora.helpers"),
        ("lora", "from keeplora.distributed import processes"),
        ("distributed", "from keeplora.lora import wrap"),
    ],
)
def test_the_law_sees_a_broken_import(room, source):
    assert list(violations(source, room))


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("cli", "from keeplora.ops import gram"),
        ("lora", "import torch"),
        ("tasks", "from keeplora.methods import State"),
        ("methods", "from keeplora.distributed import processes"),
        ("ops", "from keeplora._version import __version__"),
    ],
)
def test_the_law_lets_a_right_import_pass(room, source):
    assert not list(violations(source, room))


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
    for folder in ("keeplora", "csrc", "tests", "bench", "examples"):
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
