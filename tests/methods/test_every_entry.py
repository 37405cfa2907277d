"""Every entry of every method's state: one that is gone, or null, is refused, or the method says the same of itself."""

import copy

import pytest

from keeplora.methods import METHODS, State, StateError
from tests.methods.contract import Net, learn, make, opened, task
from tools.reliability.subjects import same


@pytest.fixture(params=sorted(METHODS))
def name(request):
    return request.param


def entries(value, path=()):
    """The path of every entry of an object, in objects too."""
    own = [(*path, key) for key in value] if isinstance(value, dict) else []
    return own + [place for at in own for place in entries(value[at[-1]], at)]


def changed(meta, place, change):
    meta = copy.deepcopy(meta)
    inside = meta
    for key in place[:-1]:
        inside = inside[key]
    change(inside, place[-1])
    return meta


def refusal(method, state):
    try:
        method.load_state(state)
    except StateError as error:
        return str(error)
    return ""


CHANGES = {"gone": dict.pop, "null": lambda inside, key: inside.update({key: None})}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("age", ["new", "learned", "open"])
def test_an_entry_that_is_gone_or_null_is_not_taken_for_another(name, age, change):
    start = Net()
    method = opened(name, start, 1)[0] if age == "open" else make(name, copy.deepcopy(start))
    if age == "learned":
        learn(method, task(0))
    state = method.state()
    asked = ("method", "config", "versions")  # of `load`, which makes the method from them
    kept = {key: state.meta[key] for key in asked}
    own = {key: value for key, value in state.meta.items() if key not in asked}
    reader, silent = make(name, copy.deepcopy(start)), []
    for place in entries(own):
        meta = kept | changed(own, place, CHANGES[change])
        if refusal(reader, State(dict(state.tensors), meta)):
            continue
        if not same(State(state.tensors, meta), reader.state()):
            silent.append("/".join(place))
        reader = make(name, copy.deepcopy(start))
    assert silent == []
    reader.load_state(state)  # after all that was refused it takes what was saved
    assert same(state, reader.state())
