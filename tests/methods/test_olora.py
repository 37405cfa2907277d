"""O-LoRA: the loss it adds, and the loss's gradient, from the definition in float64."""

import numpy as np
import pytest
import torch
from small_net import loss_fn, net, task, train

from keeplora.methods.olora import OLora, OLoraConfig, overlap

SETTINGS = {"r": 2, "alpha": 2.0, "dropout": 0.0, "target_modules": "all-linear"}


def test_overlap_and_its_gradient():
    rng = np.random.default_rng(0)
    past, a = rng.standard_normal((6, 9)), rng.standard_normal((4, 9))
    rows = torch.from_numpy(a).requires_grad_()
    value = overlap(torch.from_numpy(past), rows)
    value.backward()
    products = [[sum(p * q for p, q in zip(one, new, strict=True)) for new in a] for one in past]
    assert value.item() == pytest.approx(sum(abs(x) for row in products for x in row), rel=1e-13)
    gradient = [sum(np.sign(products[i][j]) * past[i] for i in range(6)) for j in range(4)]
    np.testing.assert_allclose(rows.grad.numpy(), gradient, rtol=1e-13)


def test_the_penalty_is_that_of_all_earlier_tasks_and_all_layers():
    method = OLora(net(), OLoraConfig(**SETTINGS, orthogonality=0.7, decay=0.3))
    learned = [[] for _ in method.slots]
    for t in range(3):
        method.before_task(task(t), loss_fn)
        expected = 0.0
        for slot, past in zip(method.slots, learned, strict=True):
            a, b = (p.detach().double().numpy() for p in (slot.adapter.A, slot.adapter.B))
            expected += 0.7 * sum(np.abs(one @ a.T).sum() for one in past)
            expected += 0.3 * (np.sqrt((a**2).sum()) + np.sqrt((b**2).sum()))
        assert method.penalty().item() == pytest.approx(expected, rel=1e-5)
        train(method, task(t))
        lengths = [(np.linalg.norm(s.adapter.A.detach()), np.linalg.norm(s.adapter.B.detach())) for s in method.slots]
        leaning = sum(
            np.abs(one @ slot.adapter.A.detach().double().numpy().T).sum()
            for slot, past in zip(method.slots, learned, strict=True)
            for one in past
        )
        assert method.penalty().item() == pytest.approx(0.7 * leaning + 0.3 * np.sum(lengths), rel=1e-5)
        for slot, past in zip(method.slots, learned, strict=True):
            past.append(slot.adapter.A.detach().double().numpy())
        method.after_task(task(t))
    for past, kept in zip(learned, method.past, strict=True):
        np.testing.assert_array_equal(kept.double().numpy(), np.concatenate(past))


def test_nothing_is_added_where_both_weights_are_zero_or_nothing_is_past():
    method = OLora(net(), OLoraConfig(**SETTINGS))
    method.before_task(task(0), loss_fn)
    assert method.penalty() is None
    method.after_task(task(0))
    method.before_task(task(1), loss_fn)
    assert method.penalty() > 0
    none = OLora(net(), OLoraConfig(**SETTINGS, orthogonality=0.0))
    none.before_task(task(0), loss_fn)
    none.after_task(task(0))
    none.before_task(task(1), loss_fn)
    assert none.penalty() is None


def test_training_turns_new_rows_away_from_old_ones():
    left = {}
    for weight in (0.0, 5.0):
        method = OLora(net(), OLoraConfig(**SETTINGS, orthogonality=weight))
        for t in range(2):
            method.before_task(task(t), loss_fn)
            train(method, task(t), steps=60, lr=0.01)
            if t == 1:
                slots = zip(method.slots, method.past, strict=True)
                left[weight] = sum(overlap(past, slot.adapter.A).item() for slot, past in slots)
            method.after_task(task(t))
    assert left[5.0] < 0.2 * left[0.0]


def test_dropout_acts_in_training_only():
    method, x = OLora(net(), OLoraConfig(**{**SETTINGS, "dropout": 0.5})), task(0)[0][0]
    method.before_task(task(0), loss_fn)
    train(method, task(0))
    assert torch.equal(method.model.eval()(x), method.model(x))
    method.model.train()
    assert not torch.equal(method.model(x), method.model(x))


@pytest.mark.parametrize("settings", [{"orthogonality": -1.0}, {"decay": float("inf")}, {"dropout": 1.0}, {"r": 0}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="OLoraConfig: "):
        OLoraConfig(**settings)
