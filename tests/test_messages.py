"""Warnings point at the user's line; names that nobody knows come with those that were probably meant."""

import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import keeplora
from keeplora._messages import listed, nearest, suggest, warn

SOURCE = """
import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from keeplora._messages import warn


def deep(depth=3):
    if depth:
        return deep(depth - 1)
    warn("a reason")


@torch.no_grad()
def decorated():
    deep()


@contextlib.contextmanager
def entered():
    deep()
    yield


@contextlib.contextmanager
def left():
    yield
    deep()


@contextlib.contextmanager
def _quietly():
    yield


@_quietly()
@torch.inference_mode()
def decorated_twice():
    with entered():
        pass


def calls_back(loss_fn):
    return deep_call(loss_fn)


def deep_call(loss_fn):
    return loss_fn()


class Layer(nn.Module):
    def forward(self, x):
        deep()
        return x


@dataclass(frozen=True)
class Config:
    r: int = 1

    def __post_init__(self):
        deep()
"""


@pytest.fixture(scope="module")
def inside():
    """Functions of a module that lies in a room of the package, as far as anybody can tell."""
    file = Path(keeplora.__file__).parent / "methods" / "imagined.py"
    names = {"__name__": "keeplora.methods.imagined"}
    sys.modules["keeplora.methods.imagined"] = type(sys)("keeplora.methods.imagined")  # dataclasses look it up
    exec(compile(SOURCE, os.fspath(file), "exec"), names)
    yield names
    del sys.modules["keeplora.methods.imagined"]


def warned_at(call):
    """File and line of the one warning that ``call`` gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (one,) = caught
    assert str(one.message) == "a reason"
    return one.filename, one.lineno


def here(offset=0):
    return __file__, inspect.currentframe().f_back.f_lineno + offset


def test_from_deep_inside(inside):
    seen = []
    seen.append(warned_at(lambda: inside["deep"]()))
    assert seen == [here(-1)]


@pytest.mark.parametrize("function", ["decorated", "decorated_twice"])
def test_through_decorators(inside, function):
    assert warned_at(lambda: inside[function]()) == here()


@pytest.mark.parametrize("manager", ["entered", "left"])
def test_through_a_context(inside, manager):
    def user():
        with inside[manager]():
            places.append(here(-1))

    places = []
    at = warned_at(user)
    assert [at] == places


def test_through_a_layer_that_torch_calls(inside):
    model = torch.nn.Sequential(torch.nn.Sequential(inside["Layer"]()))
    assert warned_at(lambda: model(torch.zeros(1))) == here()


def test_through_a_config_that_dataclasses_make(inside):
    assert warned_at(lambda: inside["Config"](r=2)) == here()


def test_from_a_function_of_the_users_that_the_package_calls(inside):
    places = []

    def loss_fn():
        places.append(here(1))
        inside["deep"]()

    assert [warned_at(lambda: inside["calls_back"](loss_fn))] == places


def test_one_warning_a_place_and_the_category(inside):
    """As Python's own: filters and "once a line" look at the user's line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            inside["deep"]()
    assert len(caught) == 1
    assert caught[0].category is UserWarning
    with pytest.warns(FutureWarning, match="going"):
        warn("going", FutureWarning)


def test_a_warning_needs_no_torch():
    program = (
        "import importlib.util, sys, warnings\n"
        f"spec = importlib.util.spec_from_file_location('m', {inspect.getfile(warn)!r})\n"
        "m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "warnings.simplefilter('error')\n"
        "try:\n"
        "    m.warn('a reason')\n"
        "except UserWarning:\n"
        "    print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_listed_shows_a_few_and_that_there_are_more():
    assert listed([]) == ""
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(["a", "b", "c", "d"]) == "a, b, c …"
    assert listed(["a", "b"], most=1) == "a …"


def test_nearest_names_come_first_and_some_come_in_any_case():
    known = ["lora", "keeplora", "gpm", "inflora", "o-lora"]
    assert nearest("keplora", known)[0] == "keeplora"
    assert nearest("gmp", known) == ["gpm"]
    assert nearest("xyz", known) == ["lora", "keeplora", "gpm"]
    assert nearest("xyz", known, most=1) == ["lora"]
    assert nearest("xyz", iter(known)) == ["lora", "keeplora", "gpm"]
    assert nearest("xyz", []) == []


def test_a_suggestion_is_made_only_where_something_is_close():
    assert suggest("minlm", ["embedded", "minilm"]) == ". Did you mean 'minilm'?"
    assert suggest("lorra", ["lora", "flora"]) == ". Did you mean 'lora' or 'flora'?"
    assert suggest("xyz", ["embedded", "minilm"]) == ""
    assert suggest("x", []) == ""
    assert suggest("minlm", ["a", "minilm"], listing=True) == ". Did you mean 'minilm'? Known: a, minilm"
    assert suggest("xyz", iter(["a", "minilm"]), listing=True) == ". Known: a, minilm"
