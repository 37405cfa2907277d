"""LoDA: general and isolated bases and the recalibration, from their definitions in float64."""

import numpy as np
import pytest
import torch
from small_net import inputs, loss_fn, net, projector, task, train, weights

from keeplora.methods.loda import LoDa, LoDaConfig, general_directions, isolated_directions, recalibrated

SETTINGS = {"r": 4, "alpha": 4.0, "target_modules": "all-linear", "ridge": 0.05}


def moments(width=9, rank=None):
    rng = np.random.default_rng(width)
    found = []
    for _ in range(2):
        turn = np.linalg.qr(rng.standard_normal((width, width)))[0]
        count = rank or width
        x = rng.standard_normal((40, count)) @ (0.7 ** np.arange(count)[:, None] * turn[:count])
        found.append(x.T @ x / 40)
    return found


def quotient(v, new, old):
    return (v @ new @ v) / (v @ old @ v)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_general_directions_hold_the_most_energy_of_both(count):
    old, new = moments()
    got = general_directions(torch.from_numpy(old), torch.from_numpy(new), count).numpy()
    u, s, _ = np.linalg.svd(old + new)
    assert np.abs(projector(got.T) - projector(u[:, :count])).max() <= 1e-9
    assert np.trace(got @ (old + new) @ got.T) == pytest.approx(s[:count].sum())


def test_isolated_directions_maximise_the_generalised_rayleigh_quotient():
    old, new = moments()
    ridge = 0.02
    shifted = old + ridge * np.trace(old) / len(old) * np.eye(len(old))
    got = isolated_directions(torch.from_numpy(old), torch.from_numpy(new), 4, ridge).numpy()
    np.testing.assert_allclose(got @ got.T, np.eye(4), atol=1e-12)
    values, vectors = np.linalg.eig(np.linalg.solve(shifted, new))  # S_new v = μ (S_old + εI) v, straight away
    order = np.argsort(values.real)[::-1]
    for j in range(1, 5):  # the leading j rows span the leading j directions
        span, _ = np.linalg.qr(vectors[:, order[:j]].real)
        assert np.abs(projector(got[:j].T) - projector(span)).max() <= 1e-8
    best = quotient(got[0], new, shifted)
    assert best == pytest.approx(values.real.max())
    rng = np.random.default_rng(1)
    others = [quotient(got[0] + 0.1 * rng.standard_normal(9), new, shifted) for _ in range(200)]
    assert max(others) < best


def test_isolated_directions_end_with_the_new_tasks_energy():
    old, new = moments(rank=3)
    got = isolated_directions(torch.from_numpy(old), torch.from_numpy(new), 6, 0.1)
    assert got.shape == (3, 9)
    empty = isolated_directions(torch.from_numpy(old * 0), torch.from_numpy(new), 2, 0.1).numpy()
    u, _, _ = np.linalg.svd(new)
    assert np.abs(projector(empty.T) - projector(u[:, :2])).max() <= 1e-9


def test_recalibration_is_the_joint_least_squares_solution():
    rng = np.random.default_rng(5)
    x_old, x_new = rng.standard_normal((50, 8)), rng.standard_normal((50, 8)) * np.linspace(0.2, 2, 8)
    a, b = np.linalg.qr(rng.standard_normal((8, 3)))[0].T, rng.standard_normal((5, 3))
    got = recalibrated(*map(torch.from_numpy, (b, a, x_old.T @ x_old, x_new.T @ x_new))).numpy()
    features = np.concatenate([x_old @ a.T, x_new @ a.T])
    wanted = np.concatenate([np.zeros((50, 5)), x_new @ a.T @ b.T])
    best, *_ = np.linalg.lstsq(features, wanted, rcond=None)
    np.testing.assert_allclose(got, best.T, rtol=1e-9)
    same = recalibrated(*map(torch.from_numpy, (b, a, 0 * x_old.T @ x_old, x_new.T @ x_new))).numpy()
    np.testing.assert_allclose(same, b, rtol=1e-9)


def test_a_task_is_learned_as_the_formulas_say():
    method, other = (LoDa(net(), LoDaConfig(**SETTINGS, recalibrate=flag)) for flag in (True, False))
    kept = None
    for t in range(3):
        data = task(t)
        x = inputs(method.model, data)
        method.before_task(data, loss_fn)
        if t == 0:
            assert method.general == [4, 4]
        else:
            assert method.general == [2, 2]
            for slot, old, features in zip(method.slots, kept, x, strict=True):
                new = features.T @ features / len(features)
                a = slot.adapter.A.detach().double().numpy()
                u, _, _ = np.linalg.svd(old + new)
                assert np.abs(projector(a[:2].T) - projector(u[:, :2])).max() <= 1e-4
                shifted = old + 0.05 * np.trace(old) / len(old) * np.eye(len(old))
                values, vectors = np.linalg.eig(np.linalg.solve(shifted, new))
                lead = np.argsort(values.real)[::-1][:2]
                assert np.abs(projector(a[2:].T) - projector(np.linalg.qr(vectors[:, lead].real)[0])).max() <= 1e-3
        train(method, data)
        start, factors = weights(method), [(s.adapter.A.clone(), s.adapter.B.clone()) for s in method.slots]
        after = inputs_of(method, data)
        method.after_task(data)
        for i, (a, b) in enumerate(factors):
            a, b = a.detach().double().numpy(), b.detach().double().numpy()
            new = after[i].T @ after[i] / len(after[i])
            if t:
                head, rows = b[:, :2], a[:2]
                both = rows @ (kept[i] + new) @ rows.T
                b = np.hstack([np.linalg.solve(both.T, (head @ rows @ new @ rows.T).T).T, b[:, 2:]])
            change = weights(method)[i] - start[i]
            assert np.abs(change - b @ a).max() <= 2e-5 * max(np.abs(change).max(), np.abs(start[i]).max())
        grams = [x.T @ x / len(x) for x in after]
        kept = grams if kept is None else [old + new for old, new in zip(kept, grams, strict=True)]
        for moment, want in zip(method.moments, kept, strict=True):
            np.testing.assert_allclose(moment.double().numpy(), want, rtol=0, atol=1e-5 * np.abs(want).max())
    for t in range(2):
        other.before_task(task(t), loss_fn)
        train(other, task(t))
        before = [slot.adapter.update().clone() @ slot.adapter.A + slot.weight for slot in other.slots]
        other.after_task(task(t))
        assert all(torch.allclose(slot.weight, w, atol=1e-6) for slot, w in zip(other.slots, before, strict=True))


def inputs_of(method, data):
    plain = net()
    with torch.no_grad():
        for layer, slot in zip((plain[0], plain[2]), method.slots, strict=True):
            layer.weight.copy_(slot.weight + slot.adapter.scaling * slot.adapter.B @ slot.adapter.A)
    return inputs(plain, data)


@pytest.mark.parametrize("settings", [{"general_share": 1.5}, {"ridge": 0.0}, {"recalibrate": 1}, {"alpha": -1}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="LoDaConfig: "):
        LoDaConfig(**settings)
