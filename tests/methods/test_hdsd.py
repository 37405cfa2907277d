"""HDSD: its split, relative changes and rescaling, against float64 from the definition."""

import math

import pytest
import torch
from torch import nn

from keeplora.methods.hdsd import Hdsd, HdsdConfig, ModulatedAdapter, update_directions
from tests.close import assert_rounded

WIDTH = 12


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 10), nn.Tanh(), nn.Linear(10, 4))


def task(seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, WIDTH, generator=g), torch.randint(4, (16,), generator=g)) for _ in range(4)]


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


CONFIG = HdsdConfig(r=3, alpha=3.0, target_modules="all-linear", general_energy=0.6, general_scale=0.25)


def trained(method, seed):
    method.before_task(task(seed), loss_fn)
    optimizer = method.optimizer(lr=2e-2)
    for batch in task(seed):
        optimizer.zero_grad()
        loss_fn(method.model, batch).backward()
        optimizer.step()
    return method


def general_projector(weight, energy):
    """V Vᵀ of the fewest right singular vectors that hold the energy."""
    _, s, v = torch.linalg.svd(weight.double())
    held = 0.0
    for k in range(len(s) + 1):
        if held >= energy * float(s.square().sum()):
            return v[:k].T @ v[:k], k
        held += float(s[k] ** 2)
    raise AssertionError


def test_updates_are_scaled_by_subspace():
    method = Hdsd(net(), CONFIG)
    method.before_task([], loss_fn)
    for slot in method.slots:
        adapter = slot.adapter
        assert isinstance(adapter, ModulatedAdapter)
        projector, k = general_projector(slot.weight.detach(), 0.6)
        assert 0 < k < slot.weight.shape[1]
        assert adapter.basis.shape[1] == k
        adapter.B.data.normal_()
        x = torch.randn(5, slot.weight.shape[1])
        modulated = 1.0 * (torch.eye(len(projector)) - projector) + 0.25 * projector
        change = adapter.B.double() @ adapter.A.double() @ modulated
        assert_rounded(adapter(x), (x.double() @ change.T).detach(), terms=4 * WIDTH, what=slot.name)


def test_each_task_splits_the_weight_it_finds():
    method = trained(Hdsd(net(), CONFIG), 0)
    method.after_task([])
    method.before_task([], loss_fn)
    slot = method.slots[0]
    projector, _ = general_projector(slot.weight.detach(), 0.6)
    basis = slot.adapter.basis.double()
    assert_rounded((basis @ basis.T).float(), projector, terms=WIDTH, what="general subspace")


def test_directions_of_an_update():
    torch.manual_seed(3)
    w, a, b = torch.randn(6, 9), torch.randn(4, 9), torch.randn(6, 4)
    found = update_directions(w, a, b)
    _, s, v = torch.linalg.svd(b.double() @ a.double())
    torch.testing.assert_close(found.s, s[:4], rtol=1e-12, atol=0)
    change = (found.u * found.s) @ found.v
    torch.testing.assert_close(change, b.double() @ a.double(), rtol=1e-12, atol=1e-12)
    for i in range(4):
        direction = w.double() @ v[i]
        response = math.sqrt(sum(value**2 for value in direction.tolist()))
        average = math.sqrt(sum(value**2 for row in w.tolist() for value in row) / 9)
        assert found.change[i].item() == pytest.approx(s[i].item() / (response + average), rel=1e-10)


@pytest.mark.parametrize("out", [2, 6])
def test_directions_at_the_rounding_level_are_none(out):
    a = torch.randn(1, 5).repeat(3, 1)
    assert update_directions(torch.randn(out, 5), a, torch.randn(out, 3)).s.shape == (1,)
    assert update_directions(torch.randn(out, 5), a, torch.zeros(out, 3)).s.shape == (0,)
    assert update_directions(torch.zeros(out, 5), a, torch.ones(out, 3)).change.tolist() == [0.0]


def test_what_changes_a_weight_unusually_much_is_scaled_down():
    """Two tasks: the threshold is of all relative changes so far, and what is merged follows the definition."""
    method, seen, scaled = Hdsd(net(), CONFIG), [[], []], 0
    for number in range(2):
        trained(method, number)
        expected = []
        for slot, changes in zip(method.slots, seen, strict=True):
            adapter, weight = slot.adapter, slot.weight.detach().double()
            projector, _ = general_projector(weight, 0.6)
            modulated = (torch.eye(len(projector)) - projector) + 0.25 * projector
            update = adapter.B.detach().double() @ adapter.A.detach().double() @ modulated
            u, s, v = torch.linalg.svd(update, full_matrices=False)
            rho = []
            for i in range(3):
                average = torch.linalg.matrix_norm(weight).item() / weight.shape[1] ** 0.5
                rho.append(s[i].item() / (torch.linalg.vector_norm(weight @ v[i]).item() + average))
            changes += rho
            mean = sum(changes) / len(changes)
            theta = mean + math.sqrt(sum((value - mean) ** 2 for value in changes) / len(changes))
            factors = torch.tensor([min(1.0, theta / value) for value in rho], dtype=torch.float64)
            scaled += int((factors < 1).sum())
            expected.append(weight + (u[:, :3] * (factors * s[:3])) @ v[:3])
        method.after_task([])
        for slot, exact in zip(method.slots, expected, strict=True):
            assert_rounded(slot.weight.detach(), exact, terms=3 * WIDTH, what=slot.name)
            assert slot.adapter is None
    assert scaled >= 2


def test_a_high_threshold_merges_what_was_learned():
    config = HdsdConfig(r=3, alpha=3.0, target_modules="all-linear", threshold=1e9)
    method, x = trained(Hdsd(net(), config), 0), torch.randn(5, WIDTH)
    learned = method.model(x)
    method.after_task([])
    torch.testing.assert_close(method.model(x), learned, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"general_energy": 1.5}, "general_energy .*got 1.5"),
        ({"general_scale": -1.0}, "general_scale .*got -1.0"),
        ({"threshold": float("nan")}, "threshold .*got nan"),
        ({"general_scale": 0.0, "task_scale": 0.0}, "must not both be 0"),
        ({"alpha": 0.0}, "HdsdConfig: alpha .*got 0.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HdsdConfig(**settings)


def test_a_state_without_its_changes_is_refused():
    method = trained(Hdsd(net(), CONFIG), 0)
    method.after_task([])
    state = method.state()
    state.tensors["0.changes"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"0\.changes must have shape \[3\], got \[2\]"):
        Hdsd(net(), CONFIG).load_state(state)
