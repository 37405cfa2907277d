"""The life of a task in every registered method: closed, saved, broken, abandoned, and gone on with."""

import copy

import pytest
import torch

from keeplora.methods import METHODS, State, load
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
    with pytest.raises(ValueError, match="state must be of method"):
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
    with pytest.raises(RuntimeError, match="previous task must be closed first"):
        method.before_task(task(0), loss_fn)
    with pytest.raises(RuntimeError, match="merge: "):
        method.merge()
