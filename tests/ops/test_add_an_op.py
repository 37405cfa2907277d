"""The op of docs/add-an-op.md, as printed there: its own tests, the contract of all ops, and the files of the steps."""

import doctest
import importlib.util
import inspect
import itertools
import re
import sys
from types import SimpleNamespace

import pages
import pytest
import torch
from ops import test_every_op as contract

import keeplora.ops
from keeplora.ops.declare import OPS

PAGE = pages.ROOT / "docs" / "add-an-op.md"
PROMISES = [
    check
    for name, check in vars(contract).items()
    if name.startswith("test_") and "op" in inspect.signature(check).parameters  # the others are of kernels
]


@pytest.fixture(autouse=True)
def op(tmp_path):
    """The page has run; what it declares is gone again after the test."""
    before = set(OPS)
    with pages.running(PAGE, tmp_path):
        assert set(OPS) - before == {"row_energies"}
        yield OPS["row_energies"]
    assert set(OPS) == before
    assert not hasattr(torch.ops.keeplora, "row_energies")
    assert not hasattr(keeplora.ops, "row_energies")


def calls(check, **available):
    """The arguments of every call of a parametrized test, with what fixtures would give in ``available``."""
    marks = [mark for mark in getattr(check, "pytestmark", []) if mark.name == "parametrize" and mark.args[0] != "op"]
    wanted = [name for name in inspect.signature(check).parameters if name in available]
    for values in itertools.product(*(mark.args[1] for mark in marks)):
        yield {name: available[name] for name in wanted} | dict(zip((m.args[0] for m in marks), values, strict=True))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda check: check.__name__)
def test_the_contract(promise, op, device, tmp_path):
    assert len(PROMISES) >= 6
    request = SimpleNamespace(path=tmp_path / "tests" / "ops" / "test_every_op.py")
    for arguments in calls(promise, op=op, device=device, request=request):
        promise(**arguments)


def test_its_own_tests_pass(device, tmp_path):
    spec = importlib.util.spec_from_file_location("page_tests", tmp_path / "tests" / "ops" / "test_row_energies.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [check for name, check in vars(module).items() if name.startswith("test_")]
    assert len(tests) >= 4
    for check in tests:
        for arguments in calls(check, device=device):
            check(**arguments)


def test_its_example_says_what_it_does():
    module = sys.modules["keeplora.ops.row_energies"]
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_the_steps_name_the_files_that_an_op_has():
    """Where a folder moves, the page has to."""
    steps = re.findall(r"^\| `([\w/]+\.\w+)` \|", PAGE.read_text(), re.M)
    assert len(steps) == 14
    names = [step.replace("NAME", "project_rows") for step in steps]
    assert [name for name in names if not (pages.ROOT / name).is_file()] == []
    there = (
        path for room in ("keeplora", "csrc", "tests", "bench") for path in (pages.ROOT / room).rglob("*project_rows*")
    )
    sources = {str(path.relative_to(pages.ROOT)) for path in there if path.suffix not in (".pyc", ".json")}
    assert sources == {name for name in names if "project_rows" in name}
