"""The life of a task in every registered method: closed, saved, broken, abandoned, and gone on with."""

import copy
import re

import pytest
import torch

from keeplora.methods import METHODS, State, StateError, load
from keeplora.methods.state import write_state
from tests.methods.contract import (
    LOOKS_AFTER,
    LOOKS_BEFORE,
    WIDTH,
    Breaking,
    Net,
    agree,
    learn,
    loss_fn,
    make,
    opened,
    outputs,
    same,
    scores,
    steps,
    task,
)


@pytest.fixture(params=sorted(METHODS))
def name(request):
    return request.param


HEADS = {"keeplora++cls": "each task brings a classifier that starts at class means, as in its public code"}


def test_a_later_task_starts_from_the_function_of_the_one_before(name):
    method, x = make(name), torch.randn(2, 4, WIDTH)
    learn(method, task(0))
    before, logits = method.model(x), scores(method.model, x)
    method.before_task(task(1), loss_fn)
    torch.testing.assert_close(method.model(x), before, rtol=0, atol=1e-6)
    if name not in HEADS:
        torch.testing.assert_close(scores(method.model, x), logits, rtol=0, atol=1e-5)


def test_state_round_trips(name):
    start = Net()
    one, other = make(name, copy.deepcopy(start)), make(name, copy.deepcopy(start))
    learn(one, task(0))
    state = one.state()
    other.load_state(State({k: v.clone() for k, v in state.tensors.items()}, copy.deepcopy(state.meta)))
    assert learn(one, task(1)) == learn(other, task(1))
    x = torch.randn(2, 4, WIDTH)
    assert torch.equal(one.model(x), other.model(x))


@pytest.mark.parametrize("tasks", [0, 1, 2])
def test_an_open_task_goes_on_from_disk_bit_for_bit(name, tasks, tmp_path):
    start, x = Net(), torch.randn(2, 4, WIDTH)
    one, optimizer = opened(name, start, tasks)
    one.save(tmp_path)
    other = load(tmp_path, copy.deepcopy(start))
    assert (type(other), other.tasks_learned, other.training_task) == (type(one), tasks, True)
    assert other.config == one.config
    assert agree(one, other, x)
    flags = {n: p.requires_grad for n, p in one.model.named_parameters()}
    assert {n: p.requires_grad for n, p in other.model.named_parameters()} == flags
    if optimizer:
        again = torch.optim.AdamW(other.trainable_parameters(), lr=1e-2)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for method, its in ((one, optimizer), (other, again)):
            steps(method, its, task(tasks)[1:], 3)
    assert one.after_task(task(tasks)) == other.after_task(task(tasks), loss_fn)
    assert learn(one, task(tasks + 1)) == learn(other, task(tasks + 1))
    assert agree(one, other, x)


class WideNet(Net):
    def forward(self, x):
        return super().forward(x.double())


def test_a_model_in_float64_goes_on_from_disk_too(name, tmp_path):
    start, x = WideNet().double(), torch.randn(2, 4, WIDTH)
    one, _ = opened(name, start, 1)
    one.save(tmp_path)
    other = load(tmp_path, copy.deepcopy(start))
    assert agree(one, other, x)
    assert one.after_task(task(1)) == other.after_task(task(1), loss_fn)
    assert agree(one, other, x)


@pytest.mark.parametrize("tasks", [0, 1, 2])
@pytest.mark.parametrize("reloaded", [False, True], ids=["at once", "after loading"])
def test_an_abandoned_task_never_was(name, tasks, reloaded, tmp_path):
    start, x = Net(), torch.randn(2, 4, WIDTH)
    start.words.weight.requires_grad_(False)
    method, never = (make(name, copy.deepcopy(start)) for _ in range(2))
    for seed in range(tasks):
        learn(method, task(seed))
        learn(never, task(seed))
    before, flags, functions = method.state(), [p.requires_grad for p in method.model.parameters()], outputs(method, x)
    method.before_task(task(5), loss_fn)
    if method.trains:
        steps(method, torch.optim.AdamW(method.trainable_parameters(), lr=0.1), task(5), 4)
        assert not torch.equal(outputs(method, x)[0], functions[0])
    if reloaded:
        method.save(tmp_path)
        method = load(tmp_path, copy.deepcopy(start))
    method.abandon_task()
    assert same(method.state(), before)
    assert all(map(torch.equal, outputs(method, x), functions))
    assert [p.requires_grad for p in method.model.parameters()] == flags
    assert all(p.grad is None for p in method.model.parameters())
    assert learn(method, task(6)) == learn(never, task(6))
    assert agree(method, never, x)


def test_loading_replaces_a_task_that_is_open(name):
    start, x = Net(), torch.randn(2, 4, WIDTH)
    method, _ = opened(name, start, 1)
    busy, _ = opened(name, start, 0)
    busy.load_state(method.state())
    assert agree(busy, method, x)


def test_state_is_a_copy(name):
    method = make(name)
    learn(method, task(0))
    state = method.state()
    kept = {k: v.clone() for k, v in state.tensors.items()}
    learn(method, task(1))
    assert all(torch.equal(kept[k], state.tensors[k]) for k in kept)


def test_evaluation_does_not_change_state(name):
    method = make(name)
    learn(method, task(0))
    before = method.state()
    method.model.eval()
    x = torch.randn(2, 4, WIDTH)
    with torch.no_grad():
        method.model(x)
        first = scores(method.model, x)
        assert torch.equal(scores(method.model, x), first)
    assert same(method.state(), before)


def test_a_task_that_cannot_be_opened_changes_nothing(name):
    method = make(name)
    learn(method, task(0))
    before, kinds = method.state(), [type(module) for module in method.model.modules()]
    if name not in LOOKS_BEFORE:
        method.before_task(Breaking(task(1)), loss_fn)  # it never looks at the data
        return
    with pytest.raises(OSError, match="the data is gone"):
        method.before_task(Breaking(task(1)), loss_fn)
    assert same(method.state(), before)
    assert [type(module) for module in method.model.modules()] == kinds
    learn(method, task(1))  # and it can be tried again


def test_a_task_that_cannot_be_closed_stays_open(name):
    method, x = make(name), torch.randn(2, 4, WIDTH)
    method.before_task(task(0), loss_fn)
    if method.trains:
        torch.manual_seed(5)
        loss_fn(method.model, task(0)[0]).backward()
        torch.optim.SGD(method.trainable_parameters(), lr=0.1).step()
    method.model.eval()
    learned = method.model(x)
    if name not in LOOKS_AFTER:
        method.after_task(Breaking(task(0)))
        return
    with pytest.raises(OSError, match="the data is gone"):
        method.after_task(Breaking(task(0)))
    assert torch.equal(method.model(x), learned)
    method.after_task(task(0))


def test_what_training_has_driven_to_nan_is_refused(name):
    method = make(name)
    method.before_task(task(0), loss_fn)
    if name in NEVER_CHECKED:
        pytest.skip(NEVER_CHECKED[name])
    with torch.no_grad():
        method.trainable_parameters()[0].view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="must be finite, got NaN or Inf"):
        method.after_task(task(0))


NEVER_CHECKED = {"zero-shot": "it trains nothing"}


def test_damaged_states_are_refused_before_anything_changes(name):
    method = make(name)
    learn(method, task(0))
    state, fresh = method.state(), make(name, Net())
    before = fresh.state()
    for broken in sorted(state.tensors):
        tensors = {k: v for k, v in state.tensors.items() if k != broken}
        for damaged in (tensors, {**tensors, broken: torch.zeros(3, 1, 2)}):
            with pytest.raises(ValueError, match="load_state: "):
                fresh.load_state(State(damaged, copy.deepcopy(state.meta)))
        assert same(fresh.state(), before)


def test_states_of_other_methods_are_refused(name):
    method = make(name)
    with pytest.raises(ValueError, match="state must"):
        method.load_state(State({}, {"method": "another"}))


def test_calls_out_of_order_are_refused(name):
    method = make(name)
    with pytest.raises(RuntimeError, match="abandon_task: a task must be open"):
        method.abandon_task()
    with pytest.raises(RuntimeError, match="after_task: a task must be open"):
        method.after_task(task(0))
    with pytest.raises(RuntimeError, match="trainable_parameters: a task must be open"):
        method.trainable_parameters()
    method.before_task(task(0), loss_fn)
    with pytest.raises(RuntimeError, match="previous task must"):
        method.before_task(task(0), loss_fn)
    with pytest.raises(RuntimeError, match="merge: "):
        method.merge()


def tampered(state):
    """States that somebody has edited: (what was done, the state)."""
    meta, tensors = copy.deepcopy(state.meta), state.tensors
    for key in sorted(meta):
        for value in (None, True, -1, "x", [["x"]], {"a": [5]}, 10**30):
            if key not in ("versions", "config") and value != meta[key]:
                yield f"{key}={value!r}", State(dict(tensors), {**copy.deepcopy(meta), key: value})
    for name in sorted(tensors):
        for change in ("missing", "nan", "int8", "complex64", "flat"):
            changed = dict(tensors)
            tensor = changed.pop(name)
            if change == "nan" and tensor.is_floating_point() and tensor.numel():
                changed[name] = torch.full_like(tensor, float("nan"))
            elif change in ("int8", "complex64"):
                changed[name] = tensor.to(getattr(torch, change))
            elif change == "flat":
                changed[name] = tensor.reshape(-1, 1, 1)
            elif change == "nan":
                continue
            yield f"{name} {change}", State(changed, copy.deepcopy(meta))
    yield "one more value", State(dict(tensors), {**copy.deepcopy(meta), "added_before": None})
    yield "one more tensor", State({**tensors, "stranger": torch.zeros(1)}, copy.deepcopy(meta))


@pytest.mark.parametrize("tasks", [0, 1])
def test_whatever_is_edited_in_a_state_is_refused_and_changes_nothing(name, tasks):
    start = Net()
    method, _ = opened(name, start, tasks)
    whole, fresh = method.state(), make(name, copy.deepcopy(start))
    before = fresh.state()
    accepted = []
    for what, state in tampered(whole):
        try:
            fresh.load_state(state)
        except StateError:
            assert same(fresh.state(), before), what
        else:
            accepted.append(what)
            fresh = make(name, copy.deepcopy(start))
    assert [what for what in accepted if not what.startswith(ACCEPTED)] == []


ACCEPTED = ("training_task=",)
"""What no state can know: a method that trains nothing has no open task to miss."""


def test_bases_that_protect_nothing_are_refused(name):
    start = Net()
    method, fresh = make(name, copy.deepcopy(start)), make(name, copy.deepcopy(start))
    learn(method, task(0))
    state = method.state()
    bases = [key for key in state.tensors if re.search(r"\.basis(\.\d+)?$", key) and ".adapter." not in key]
    for key in bases:
        if state.tensors[key].numel():
            with pytest.raises(StateError, match=re.escape(key.split(".basis")[0] + ".basis")):
                fresh.load_state(State({**state.tensors, key: 0 * state.tensors[key]}, copy.deepcopy(state.meta)))
    assert bases or name not in {"keeplora", "keeplora++", "keeplora++cls", "gpm", "inflora", "duallora"}


@pytest.mark.parametrize("meta", [{"method": ["x"]}, {"config": {"zzz": 1}}, {"config": 5}, {"tasks_learned": "x"}])
def test_a_load_that_fails_leaves_the_model_as_it_was(name, meta, tmp_path):
    method = make(name)
    learn(method, task(0))
    state = method.state()
    write_state(tmp_path, State(state.tensors, {**state.meta, **meta}))
    model = Net()
    kinds, keys = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(StateError, match=r"^load"):
        load(tmp_path, model)
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_put_into_a_model_in_evaluation_is_in_evaluation(name, tmp_path):
    start = Net()
    method, _ = opened(name, start, 1)
    method.save(tmp_path)
    loaded, other = load(tmp_path, copy.deepcopy(start).eval()), make(name, copy.deepcopy(start).eval())
    other.before_task(task(0), loss_fn)
    for each in (loaded, other):
        assert [path for path, module in each.model.named_modules() if module.training] == []
        each.abandon_task()
        assert [path for path, module in each.model.named_modules() if module.training] == []


def test_a_copy_of_an_open_task_is_trained_as_the_task_is(name):
    method, _ = opened(name, Net(), 1)
    twin = copy.deepcopy(method)
    for each in (method, twin):
        if each.trains:
            steps(each, torch.optim.SGD(each.trainable_parameters(), lr=0.1), task(1), 2)
        each.after_task(task(1))
    assert agree(method, twin, torch.randn(2, 4, WIDTH))
