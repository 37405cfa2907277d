"""SD-LoRA: directions and magnitudes, from the paper's formula in float64."""

import numpy as np
import pytest
import torch
from small_net import loss_fn, net, task, train, weights

from keeplora.methods.sdlora import SdLora, SdLoraConfig

SETTINGS = {"r": 2, "alpha": 6.0, "target_modules": "all-linear"}


def wide(*tensors):
    return [t.detach().double().numpy() for t in tensors]


def test_weights_are_the_formula_in_and_after_every_task():
    method = SdLora(net(), SdLoraConfig(**SETTINGS))
    start, known = weights(method), [[] for _ in method.slots]  # every task's B A, never touched again
    for t in range(3):
        data = task(t)
        method.before_task(data, loss_fn)
        train(method, data)
        x, expected = data[0][0], []
        for slot, w, past in zip(method.slots, start, known, strict=True):
            a, b, magnitudes = wide(slot.adapter.A, slot.adapter.B, slot.adapter.magnitudes)
            assert len(magnitudes) == t + 1
            total = magnitudes[-1] * b @ a
            for magnitude, (old_b, old_a) in zip(magnitudes, past, strict=False):
                total += magnitude * old_b @ old_a / (np.linalg.norm(old_b) * np.linalg.norm(old_a))
            expected.append(w + 3.0 * total)
            past.append((b, a))
        first, second = (slot.host for slot in method.slots)
        bias, other = wide(first.bias, second.bias)
        by_hand = np.tanh(x.double().numpy() @ expected[0].T + bias) @ expected[1].T + other
        np.testing.assert_allclose(method.model(x).detach().numpy(), by_hand, rtol=1e-4, atol=1e-5)
        method.after_task(data)
        for got, want in zip(weights(method), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=4e-6 * np.abs(want).max())


def test_old_directions_stay_and_magnitudes_are_learned_on():
    method = SdLora(net(), SdLoraConfig(**SETTINGS))
    for t in range(2):
        method.before_task(task(t), loss_fn)
        assert [slot.adapter.magnitudes[-1].item() for slot in method.slots] == pytest.approx([0.8, 0.8])
        before = method.directions
        train(method, task(t))
        method.after_task(task(t))
    for old, new in zip(before, method.directions, strict=True):
        assert torch.equal(new.a[:2], old.a)
        assert torch.equal(new.b[:, :2], old.b)
        assert (new.magnitudes[:1] - old.magnitudes).abs() > 1e-3
        for i in range(2):
            rows, columns = new.a[2 * i : 2 * i + 2], new.b[:, 2 * i : 2 * i + 2]
            assert rows.norm().item() == pytest.approx(1, abs=1e-6)
            assert columns.norm().item() == pytest.approx(1, abs=1e-6)


def test_gradients_reach_every_magnitude():
    method = SdLora(net(), SdLoraConfig(**SETTINGS))
    for t in range(2):
        method.before_task(task(t), loss_fn)
        train(method, task(t))
        method.after_task(task(t))
    method.before_task(task(2), loss_fn)
    for slot in method.slots:  # B = 0 at the start: the new magnitude's gradient is 0 until B has moved
        with torch.no_grad():
            slot.adapter.B.normal_()
    loss_fn(method.model, task(2)[0]).backward()
    for slot in method.slots:
        adapter = slot.adapter
        rescaled = adapter.magnitudes.grad.double()
        h = 1e-3
        for i in range(3):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    adapter.magnitudes[i] += sign * h
                    values.append(loss_fn(method.model, task(2)[0]).double().item())
                    adapter.magnitudes[i] -= sign * h
            assert rescaled[i].item() == pytest.approx((values[0] - values[1]) / (2 * h), abs=2e-3)
            assert rescaled[i] != 0


def test_an_update_that_never_moved_is_remembered_as_nothing():
    method = SdLora(net(), SdLoraConfig(**SETTINGS))
    before = weights(method)
    for t in range(2):
        method.before_task(task(t), loss_fn)
        method.after_task(task(t))
    assert all(np.array_equal(a, b) for a, b in zip(before, weights(method), strict=True))
    assert all(torch.equal(d.magnitudes, torch.zeros(2)) for d in method.directions)


@pytest.mark.parametrize("settings", [{"magnitude": 0.0}, {"magnitude": float("nan")}, {"alpha": 0.0}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="SdLoraConfig: "):
        SdLoraConfig(**settings)
