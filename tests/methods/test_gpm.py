"""GPM: bases, ranks and projected gradients from the paper's formulas, in float64."""

import numpy as np
import pytest
import torch
from small_net import inputs, loss_fn, net, projector, task, train, weights
from torch import nn

from keeplora.methods.gpm import Gpm, GpmConfig

ALL = {"target_modules": "all-linear"}


def extended(basis, features, energy):
    """Eqs. 5, 8, 9 of the paper: singular vectors of what the basis leaves of the samples, until the share is reached.

    ``features [samples, in]``.
    """
    samples = features.T
    total = (np.linalg.svd(samples, compute_uv=False) ** 2).sum()
    left = samples - basis @ (basis.T @ samples)
    u, s, _ = np.linalg.svd(left, full_matrices=False)
    share, count = 1 - (s**2).sum() / total, 0
    while share < energy:
        share += s[count] ** 2 / total
        count += 1
    return np.hstack([basis, u[:, :count]])


def test_bases_and_ranks_are_the_papers():
    method = Gpm(net(), GpmConfig(feature_energy=0.8, energy_step=0.05, **ALL))
    expected = [np.zeros((slot.weight.shape[1], 0)) for slot in method.slots]
    ranks = []
    for t in range(3):
        data = task(t)
        method.before_task(data, loss_fn)
        train(method, data, optimizer=method.optimizer(lr=0.1))
        features = inputs(method.model, data)
        method.after_task(data)
        expected = [extended(q, x, 0.8 + 0.05 * t) for q, x in zip(expected, features, strict=True)]
        for got, want in zip(method.bases, expected, strict=True):
            assert got.shape == want.shape
            # directions are separated by a tenth of the energy or more; float32 statistics move them by eps of that
            assert np.abs(projector(got) - projector(want)).max() <= 1e-5
        ranks.append([q.shape[1] for q in method.bases])
        assert [layer.protected for layer in method.capacity()] == ranks[-1]
    assert ranks[0] < ranks[1] < ranks[2]
    assert [layer.added_by_task for layer in method.capacity()] == [
        tuple(np.diff([0, *column]).tolist()) for column in zip(*ranks, strict=True)
    ]


def test_gradients_lose_what_the_basis_holds():
    method, data = Gpm(net(torch.float64), GpmConfig(feature_energy=0.8, **ALL)), task(0, torch.float64)
    method.before_task(data, loss_fn)
    train(method, data, optimizer=method.optimizer(lr=0.1))
    method.after_task(data)
    method.before_task(data, loss_fn)
    batch = task(1, torch.float64)[0]
    loss_fn(method.model, batch).backward()
    got = [p.grad.numpy() for p in method.trainable_parameters()]
    plain = net(torch.float64)
    plain.load_state_dict(method.model.state_dict())
    loss_fn(plain, batch).backward()
    for grad, layer, basis in zip(got, (plain[0], plain[2]), method.bases, strict=True):
        g, m = layer.weight.grad.numpy(), basis.numpy()
        np.testing.assert_allclose(grad, g - g @ m @ m.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weights_keep_out_of_the_basis_with_the_methods_own_optimizer(momentum):
    method, data = Gpm(net(torch.float64), GpmConfig(feature_energy=0.8, **ALL)), task(0, torch.float64)
    before = None
    for t in range(2):
        method.before_task(data, loss_fn)
        before = weights(method)
        optimizer = method.optimizer(lr=0.1, momentum=momentum, weight_decay=0.1)  # decay would leave the free space
        train(method, task(t, torch.float64), optimizer=optimizer)
        bases = [basis.numpy() for basis in method.bases]
        method.after_task(data)
    changes = [now - then for now, then in zip(weights(method), before, strict=True)]
    for change, basis in zip(changes, bases, strict=True):
        assert basis.shape[1] > 0
        assert np.linalg.norm(change) > 1e-3
        assert np.linalg.norm(change @ basis) <= 1e-12 * np.linalg.norm(change)


def test_adam_leaves_the_free_space():
    """Why the default optimizer is SGD."""
    method, data = Gpm(net(torch.float64), GpmConfig(feature_energy=0.8, **ALL)), task(0, torch.float64)
    method.before_task(data, loss_fn)
    method.after_task(data)
    method.before_task(data, loss_fn)
    before = weights(method)[0]
    train(method, task(1, torch.float64))
    change = weights(method)[0] - before
    assert np.linalg.norm(change @ method.bases[0].numpy()) > 0.01 * np.linalg.norm(change)


def test_rows_of_a_fused_weight_that_were_not_chosen_stay():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x, need_weights=False)[0]

    method = Gpm(Attending(), GpmConfig(target_modules=("v_proj",)))
    before = method.model.attn.in_proj_weight.detach().clone()
    method.before_task([], lambda model, x: model(x).square().sum())
    (parameter,) = method.trainable_parameters()
    assert parameter is method.model.attn.in_proj_weight
    optimizer = method.optimizer(lr=0.1, weight_decay=0.1)
    method.model(torch.randn(2, 3, 8)).square().sum().backward()
    optimizer.step()
    assert torch.equal(parameter[:16], before[:16])
    assert not torch.equal(parameter[16:], before[16:])


def test_first_task_is_free_and_hooks_end_with_the_task():
    method, data = Gpm(net(), GpmConfig(**ALL)), task(0)
    method.before_task(data, loss_fn)
    loss_fn(method.model, data[0]).backward()
    plain = net()
    loss_fn(plain, data[0]).backward()
    assert torch.equal(method.model[0].weight.grad, plain[0].weight.grad)
    method.after_task(data)
    assert not any(p.requires_grad for p in method.model.parameters())
    assert not method.model[0].weight._backward_hooks


def test_weights_that_are_not_finite_are_refused():
    method, data = Gpm(net(), GpmConfig(**ALL)), task(0)
    method.before_task(data, loss_fn)
    with torch.no_grad():
        method.model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"after_task: trained parameters must be finite, got NaN or Inf \[2\]"):
        method.after_task(data)


@pytest.mark.parametrize("settings", [{"feature_energy": 1.2}, {"feature_energy": True}, {"energy_step": -0.1}])
def test_bad_settings(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"GpmConfig: {name} .*got {value}"):
        GpmConfig(**settings)
