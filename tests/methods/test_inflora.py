"""InfLoRA and DualGPM: designs, bases, ranks and the switch to the complement, from the formulas in float64."""

import warnings

import numpy as np
import pytest
import torch
from small_net import inputs, loss_fn, net, projector, task, train, weights

from keeplora.methods.inflora import DualBasis, InfLora, InfLoraConfig, _grown, extended

ENERGY = {"feature_energy": 0.9, "final_energy": 0.99, "tasks": 6}
SETTINGS = {"r": 3, "alpha": 3.0, "target_modules": "all-linear", **ENERGY}


def gram(x):
    return x.T @ x / len(x)


class ReferenceMemory:
    """DualGPM as the paper has it: two cases, by singular vectors of the (projected) second moment."""

    def __init__(self, width):
        self.width, self.columns, self.kind = width, np.zeros((width, 0)), "remove"

    def projected(self, c):
        inside = self.columns @ (self.columns.T @ c)
        return c - inside if self.kind == "remove" else inside

    def update(self, c, energy):
        total = (np.linalg.svd(c, compute_uv=False) ** 2).sum()
        u, s, _ = np.linalg.svd(self.projected(c))
        shares, free = s**2 / total, (s**2).sum() / total
        count = 0
        while 1 - free < energy:
            free -= shares[count]
            count += 1
        if self.kind == "remove":
            self.columns = np.hstack([self.columns, u[:, :count]])
            if self.columns.shape[1] > self.width / 2:
                whole, _, _ = np.linalg.svd(self.columns)
                self.columns, self.kind = whole[:, self.columns.shape[1] :], "retain"
        else:
            left = self.columns - u[:, :count] @ (u[:, :count].T @ self.columns)
            kept, _, _ = np.linalg.svd(left)
            self.columns = kept[:, : self.columns.shape[1] - count]


def test_designs_memories_and_ranks_are_the_papers():
    method = InfLora(net(), InfLoraConfig(**SETTINGS))
    expected = [ReferenceMemory(slot.weight.shape[1]) for slot in method.slots]
    kinds = []
    for t in range(4):
        data = task(t)
        before = inputs(method.model, data)
        method.before_task(data, loss_fn)
        for slot, memory, x in zip(method.slots, expected, before, strict=True):
            u, _, _ = np.linalg.svd(memory.projected(gram(x)))
            a = slot.adapter.A.detach().double().numpy()
            np.testing.assert_allclose(a @ a.T, np.eye(3) / 3, atol=1e-6)
            assert np.abs(3 * projector(a.T) - projector(u[:, :3])).max() <= 2e-3
            assert not slot.adapter.B.any()
            assert not slot.adapter.A.requires_grad
            assert slot.adapter.scaling == 1.0
        start = weights(method)
        free = [b.free_space().numpy() if b else None for b in method.bases]
        train(method, data)
        after = inputs_with_adapters(method, data)
        method.after_task(data)
        for now, then, space in zip(weights(method), start, free, strict=True):
            change = now - then
            outside = 0.0 if space is None else np.linalg.norm(change - change @ space @ space.T)
            assert np.linalg.norm(change) > 1e-3
            assert outside <= 1e-5 * np.linalg.norm(change)  # rounding of W at its own size included
        for memory, x, got in zip(expected, after, method.bases, strict=True):
            memory.update(gram(x), method.config.energy_after(t))
            assert got.columns.shape == memory.columns.shape
            assert got.free == (memory.kind == "retain")
            assert np.abs(projector(got.columns) - projector(memory.columns)).max() <= 2e-3
            assert 2 * got.columns.shape[1] <= memory.width
            gram_of_columns = got.columns.double().T @ got.columns.double()
            assert (gram_of_columns - torch.eye(len(gram_of_columns))).abs().max() <= 5e-6
        kinds.append([b.free for b in method.bases])
    assert kinds[0] == [False, False]
    assert any(any(row) for row in kinds), "no memory ever switched to the complement"
    assert [layer.protected for layer in method.capacity()] == [b.protected for b in method.bases]


def inputs_with_adapters(method, data):
    """Inputs of both layers with the open adapters merged into a copy of the weights."""
    plain = net()
    with torch.no_grad():
        for layer, slot in zip((plain[0], plain[2]), method.slots, strict=True):
            layer.weight.copy_(slot.weight + slot.adapter.scaling * slot.adapter.B @ slot.adapter.A)
            layer.bias.copy_(slot.host.bias)
    return inputs(plain, data)


@pytest.mark.parametrize("width", [7, 8])
def test_the_memory_switches_past_half_and_protects_the_same_space_either_way(width):
    rng = np.random.default_rng(3)
    reference, dual = ReferenceMemory(width), DualBasis(torch.zeros(width, 0, dtype=torch.float64))
    plain = np.zeros((width, 0))  # ordinary GPM, which never switches
    seen = set()
    for energy in (0.5, 0.8, 0.9, 0.99, 0.999, 1.0):
        mix = np.linalg.qr(rng.standard_normal((width, width)))[0] * 0.7 ** np.arange(width)
        c = mix @ mix.T
        reference.update(c, min(energy, 1 - 1e-12))
        (dual,) = extended([dual], [torch.from_numpy(c @ c)], energy)
        plain = np.linalg.svd(plain @ plain.T)[0][:, : plain.shape[1]]
        left = c - plain @ (plain.T @ c)
        u, s, _ = np.linalg.svd(left)
        count, share, total = 0, 1 - (s**2).sum() / (c**2).sum(), (c**2).sum()
        while share < min(energy, 1 - 1e-12):
            share += s[count] ** 2 / total
            count += 1
        plain = np.hstack([plain, u[:, :count]])
        assert dual.protected == plain.shape[1]
        assert dual.free == (reference.kind == "retain") == (2 * dual.protected > width)
        protected = np.eye(width) - projector(dual.free_space().numpy())
        np.testing.assert_allclose(protected, projector(plain), atol=1e-9)
        seen.add(dual.free)
    assert seen == {False, True}


@pytest.mark.parametrize("free", [False, True])
def test_what_a_basis_holds_of_a_moment_is_known_either_way(free):
    torch.manual_seed(0)
    s = torch.diag(torch.rand(9, dtype=torch.float64))
    columns = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64)).Q
    [(basis, extension)] = _grown([DualBasis(columns, free=free)], [s], 0.9)
    space = basis.free_space()
    left = float((space.T @ s @ space).trace() / s.trace())
    assert extension.fraction == pytest.approx(1 - left, abs=1e-12)
    assert 0.9 <= extension.fraction < 1
    assert basis.free_share(s) == pytest.approx(left, abs=1e-12)
    assert basis.free_share(0 * s) is None


def test_the_protected_share_grows_from_the_first_task_on():
    config = InfLoraConfig(**{**SETTINGS, "feature_energy": 0.9, "final_energy": 1.0, "tasks": 4})
    assert [config.energy_after(t) for t in range(6)] == pytest.approx([0.9, 0.925, 0.95, 0.975, 1.0, 1.0])


def test_full_memory_leaves_nothing_to_adapt_and_says_so():
    everything = {"feature_energy": 1.0, "final_energy": 1.0, "statistic": "moment"}
    method, data = InfLora(net(), InfLoraConfig(**{**SETTINGS, **everything})), task(0)
    method.before_task(data, loss_fn)
    method.after_task(data)
    assert [layer.free for layer in method.capacity()] == [0, 0]
    with pytest.warns(UserWarning, match=r"2 of 2 layers .*: 0, 2"):
        method.before_task(data, loss_fn)
    assert method.trainable_parameters() == []
    before = weights(method)
    method.after_task(data)
    assert all(np.array_equal(a, b) for a, b in zip(before, weights(method), strict=True))


def test_less_room_than_r_is_used_and_said():
    method, data = InfLora(net(), InfLoraConfig(**{**SETTINGS, "r": 9, "alpha": 9.0})), task(0)
    method.before_task(data, loss_fn)
    method.after_task(data)
    with pytest.warns(UserWarning, match=r"1 of 2 layers .* r = 9 .*: 0"):
        method.before_task(data, loss_fn)
    assert 0 < len(method.slots[0].adapter.A) < 9


def test_statistic_decides_what_energy_is():
    ranks = {}
    for kind in ("squared", "moment"):
        method, data = InfLora(net(), InfLoraConfig(**{**SETTINGS, "statistic": kind})), task(0)
        method.before_task(data, loss_fn)
        method.after_task(data)
        ranks[kind] = [b.protected for b in method.bases]
        x, _ = inputs(method.model, data)
        values = np.linalg.eigvalsh(gram(x))[::-1] ** (2 if kind == "squared" else 1)
        assert ranks[kind][0] == int((np.cumsum(values) / values.sum() < 0.9).sum()) + 1
    assert ranks["squared"][0] < ranks["moment"][0]


@pytest.mark.parametrize(
    "settings", [{"tasks": 0}, {"tasks": True}, {"statistic": "gram"}, {"feature_energy": -1.0}, {"r": 0}]
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="InfLoraConfig: "):
        InfLoraConfig(**settings)


def test_no_warning_where_there_is_room():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InfLora(net(), InfLoraConfig(**SETTINGS)).before_task(task(0), loss_fn)
