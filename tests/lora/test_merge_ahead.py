"""Merged weights formed ahead, all in one call: the same numbers, used once, never out of date."""

import copy

import pytest
import torch
from torch import nn

import keeplora.lora.forward as forward
from keeplora.lora import LoraAdapter, linear_targets, merge_ahead, wrap

WIDTH = 8


@pytest.fixture
def calls(monkeypatch):
    """How many weights each call of the op merged."""
    sizes = []
    original = forward._merge

    def counting(w, *args, **kwargs):
        sizes.append(len(w))
        return original(w, *args, **kwargs)

    monkeypatch.setattr(forward, "_merge", counting)
    return sizes


def make(layers=3):
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers))).requires_grad_(False)
    for slot in wrap(model, linear_targets(model)):
        slot.attach(LoraAdapter(torch.randn(2, WIDTH), torch.randn(WIDTH, 2), 0.5))
    return model


def step(model, x):
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_one_call_per_forward_and_the_same_bits(calls):
    model, x = make(), torch.randn(20, WIDTH)
    plain = copy.deepcopy(model)
    merge_ahead(model)
    for expected in ([1, 1, 1], [3], [3]):
        for p in [*model.parameters(), *plain.parameters()]:
            p.grad = None
        calls.clear()
        got = step(model, x)
        assert calls == expected
        assert all(torch.equal(a, b) for a, b in zip(got, step(plain, x), strict=True))
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            if p.grad is not None:
                with torch.no_grad():
                    p.sub_(1e-5 * p.grad)
                    q.sub_(1e-5 * q.grad)


def replace(slot):
    slot.detach()
    slot.attach(LoraAdapter(torch.ones(2, WIDTH), torch.ones(WIDTH, 2), 0.5))


CHANGES = {
    "A": lambda slot: slot.adapter.A.mul_(3),
    "B": lambda slot: slot.adapter.B.mul_(3),
    "B0": lambda slot: slot.adapter.origin.mul_(3),
    "B0 put there": lambda slot: setattr(slot.adapter, "origin", torch.ones(WIDTH, 2)),
    "scaling": lambda slot: setattr(slot.adapter, "scaling", 2.0),
    "the weight": lambda slot: slot.weight.mul_(3),
    "the memory of B": lambda slot: setattr(slot.adapter.B, "data", torch.ones(WIDTH, 2)),
    "the adapter": replace,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_preparation_and_use_is_noticed(change):
    model, x = make(), torch.randn(20, WIDTH)
    model[2].adapters["weight"].origin = None if change is CHANGES["B0 put there"] else torch.randn(WIDTH, 2)
    merge_ahead(model)
    before, *_ = step(model, x)

    def interfere(module, args):
        with torch.no_grad():
            change(model[2].slots["weight"])

    handle = model[1].register_forward_pre_hook(interfere)  # in the middle of the forward
    for p in model.parameters():
        p.grad = None
    got = step(model, x)
    handle.remove()
    plain = copy.deepcopy(model)
    plain._forward_pre_hooks.clear()
    for p in plain.parameters():
        p.grad = None
    assert not torch.equal(got[0], before)
    assert all(torch.equal(a, b) for a, b in zip(got, step(plain, x), strict=True))


def test_changes_between_forwards_are_seen_whatever_made_them():
    model, x = make(), torch.randn(20, WIDTH)
    merge_ahead(model)
    step(model, x)
    before = model(x)
    model[0].adapters["weight"].B.data.mul_(2)  # behind the version counter
    after = model(x)
    plain = copy.deepcopy(model)
    plain._forward_pre_hooks.clear()
    assert not torch.allclose(before, after)
    assert torch.equal(after, plain(x))


def test_nothing_is_kept_after_a_forward(calls):
    model, x = make(), torch.randn(20, WIDTH)
    merge_ahead(model)
    step(model, x)

    class Stop(Exception):
        pass

    def stop(module, args):
        raise Stop

    handle = model[1].register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        model(x)
    assert not any(layer.merged_ahead for layer in model)
    handle.remove()
    with torch.no_grad():
        calls.clear()
        model(x)
        assert calls == [1, 1, 1]
    model(x[:1])  # few tokens: the factored way, which the next forward remembers
    calls.clear()
    model(x[:1])
    assert calls == []


def test_checkpoints_and_repeated_layers(calls):
    model, x = make(2), torch.randn(20, WIDTH, requires_grad=True)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            y = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)
            return self.inner(y)

    outer = Twice()
    plain = copy.deepcopy(outer)
    merge_ahead(outer)
    for _ in range(2):
        for p in [*outer.parameters(), *plain.parameters()]:
            p.grad = None
        assert all(torch.equal(a, b) for a, b in zip(step(outer, x), step(plain, x), strict=True))


def test_autocast_merges_in_its_dtype(calls):
    model, x = make(), torch.randn(20, WIDTH)
    merge_ahead(model)
    for expected in ([1, 1, 1], [3]):
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        assert calls == expected
    for expected in ([1, 1, 1], [3]):  # another dtype around it: learned beside the first
        calls.clear()
        assert model(x).dtype == torch.float32
        assert calls == expected
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert calls == [3]


def test_autocast_inside_of_the_forward_merges_once(calls):
    """As Accelerate does: it replaces model.forward, which the hooks run around."""
    model, x = make(), torch.randn(20, WIDTH)
    merge_ahead(model)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    for expected in ([1, 1, 1], [3], [3]):
        calls.clear()
        assert model(x).dtype == torch.bfloat16
        assert calls == expected


def test_functional_call_with_parameters_of_its_own():
    model, x = make(), torch.randn(20, WIDTH)
    merge_ahead(model)
    before = step(model, x)[0]
    other = make()
    for _ in range(2):
        got = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
        assert torch.equal(got, other(x))
    assert torch.equal(model(x), before)


def test_a_compiled_model_gives_the_same(calls):
    model, x = make(), torch.randn(20, WIDTH)
    merge_ahead(model)
    expected = step(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for p in model.parameters():
            p.grad = None
        for a, b in zip(step(compiled, x), expected, strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        model[1].adapters["weight"].B.mul_(2)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(model(x), expected[0])


def test_a_copy_has_its_own_and_handles_remove(calls):
    model, x = make(), torch.randn(20, WIDTH)
    handles = merge_ahead(model)
    step(model, x)
    twin = copy.deepcopy(model)
    calls.clear()
    twin(x)
    assert calls == [3]
    assert not any(layer.merged_ahead for layer in model)
    for handle in handles:
        handle.remove()
    calls.clear()
    model(x)
    assert calls == [1, 1, 1]


def test_a_whole_model_compiles_in_one_graph_and_stays_up_to_date():
    model = make()
    merge_ahead(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(20, WIDTH)
        found = []
        for call in (model, compiled):
            model.zero_grad()
            found.append(step(call, x))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.sub_(0.01 * p.grad)
