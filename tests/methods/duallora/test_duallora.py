"""DualLoRA: its bases, two projections, dynamic memory and calibration, against float64 from the definition."""

import copy
import math

import pytest
import tiny_workload
import torch
from torch import nn

from keeplora.families.class_tokens import ClassTokens
from keeplora.methods.duallora.calibration import ImageFeatures, KnownTask, TaskCalibration
from keeplora.methods.duallora.method import DualLora, DualLoraConfig
from keeplora.methods.duallora.residual import DualAdapter, ResidualAdapter
from keeplora.tasks.classification import Batch, accuracy, classification_loss, loader, normalize
from tests.close import assert_rounded
from tests.confined import basis

OUT, IN, SCALE = 5, 10, 0.5


def spanned(d, *counts, dtype=torch.float64):
    """Orthonormal columns, split into consecutive bases."""
    return list(basis(d, sum(counts), dtype).split(counts, dim=1))


def adapter(dtype=torch.float64, seed=0):
    """An orthogonal part outside of Φ, and the residual adapters of two tasks, the later one open."""
    torch.manual_seed(seed)
    first, second, more = spanned(IN, 2, 3, 1, dtype=dtype)
    residuals = []
    for psi, q, share in ((first, 2, 0.7), (second, 2, 0.1)):
        r, b = torch.randn(q, psi.shape[1], dtype=dtype), torch.randn(OUT, q, dtype=dtype)
        residuals.append(ResidualAdapter(r, b, psi, share))
    a, b = torch.randn(3, IN, dtype=dtype), torch.randn(OUT, 3, dtype=dtype)
    phi = torch.cat([first, more], dim=1)
    return DualAdapter(a, b, SCALE, basis=phi, residuals=residuals, tokens=ClassTokens({}), tower="model")


def likeness(x, psi, share):
    """min(1, ‖Ψᵀx‖² / (ρ ‖x‖²)) of one vector, term by term."""
    inside = sum(sum(v * p for v, p in zip(x.tolist(), column.tolist(), strict=True)) ** 2 for column in psi.T)
    return min(1.0, inside / (share * sum(v * v for v in x.tolist())))


def change(made, x, part):
    """The update one sample sees: of the orthogonal part, or of a task's."""
    if part == "orthogonal":
        phi = made.basis.double()
        return SCALE * made.B.double() @ made.A.double() @ (torch.eye(IN) - phi @ phi.T)
    task = made.residuals[part]
    down = task.R.double() @ task.basis.double().T
    return SCALE * likeness(x[0].double(), task.basis.double(), task.share) * task.B.double() @ down


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_sample_is_given_as_much_of_a_task_as_it_is_alike(dtype):
    made, x = adapter(dtype), torch.randn(6, 4, IN, dtype=dtype)
    x[1, 0] = made.residuals[0].basis[:, 0]  # altogether the first task's: the weight is cut at 1
    x[2, 0] = made.residuals[1].basis[:, 1]
    x[3, 0] = 0
    x[3, 0, 0] = 1e-20
    exact = torch.stack([s.double() @ sum(change(made, s, p) for p in ("orthogonal", 0, 1)).T for s in x])
    assert_rounded(made(x), exact.detach(), terms=3 * IN, what="dual adapter")
    weights = made.weights(x)
    assert weights[1].tolist() == [1.0, pytest.approx(0.0, abs=1e-6)]
    assert weights[2].tolist() == [pytest.approx(0.0, abs=1e-6), 1.0]


def test_a_sample_of_zeros_is_alike_to_none():
    assert adapter().weights(torch.zeros(1, 2, IN)).tolist() == [[0.0, 0.0]]


def test_samples_do_not_depend_on_their_batch():
    made, x = adapter(), torch.randn(6, 4, IN, dtype=torch.float64)
    torch.testing.assert_close(torch.cat([made(s[None]) for s in x]), made(x), rtol=1e-12, atol=1e-12)
    rows = x[:, 0]
    torch.testing.assert_close(made(rows), made(x)[:, 0], rtol=1e-12, atol=1e-12)


def test_both_updates_are_projected():
    """A step of gradient descent moves A_o by −η G (I − ΦΦᵀ) and the open task's A by −η G ΨΨᵀ, G that of a free A."""
    made, rate = adapter(), 0.1
    x, dy = torch.randn(6, 4, IN, dtype=torch.float64), torch.randn(6, 4, OUT, dtype=torch.float64)
    before = made.down().detach(), made.residuals[1].down().detach()
    made(x).backward(dy)
    free = torch.zeros(3, IN).double(), torch.zeros(2, IN).double()
    for sample, delta in zip(x, dy, strict=True):
        for token, slope in zip(sample, delta, strict=True):
            free[0].add_(SCALE * torch.outer(made.B.detach().T @ slope, token))
            task = made.residuals[1]
            weight = likeness(sample[0], task.basis, task.share)
            free[1].add_(SCALE * weight * torch.outer(task.B.detach().T @ slope, token))
    torch.optim.SGD([made.A, made.residuals[1].R], lr=rate).step()
    phi, psi = made.basis, made.residuals[1].basis
    moved = made.down().detach() - before[0], made.residuals[1].down().detach() - before[1]
    assert_rounded(moved[0], -rate * free[0] @ (torch.eye(IN) - phi @ phi.T), terms=24 * IN, what="orthogonal")
    assert_rounded(moved[1], -rate * free[1] @ psi @ psi.T, terms=24 * IN, what="residual")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def task(seed):
    g = torch.Generator().manual_seed(seed)
    turn = torch.randn(12, 12, generator=g) * torch.arange(1, 13) ** -1.0
    return [(torch.randn(16, 12, generator=g) @ turn, torch.randint(4, (16,), generator=g)) for _ in range(4)]


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


CONFIG = DualLoraConfig(r=2, alpha=2.0, target_modules="all-linear", feature_energy=0.7)


def trained(method, seed):
    method.before_task(task(seed), loss_fn)
    optimizer = method.optimizer(lr=2e-2)
    for batch in task(seed) * 2:
        optimizer.zero_grad()
        loss_fn(method.model, batch).backward()
        optimizer.step()
    return method


def leading(moment, phi, energy, most=None):
    """As few eigenvectors of P C P as bring Φ's energy to the threshold; with ``most`` their own, to that of P C P."""
    p = torch.eye(len(moment), dtype=torch.float64) - phi @ phi.T
    values, vectors = torch.linalg.eigh(p @ moment @ p)
    held = 0.0 if most else float(torch.trace(phi.T @ moment @ phi))
    total = float(torch.trace(p @ moment @ p if most else moment))
    k = 0
    while held < energy * total and k != most:
        held += float(values[-1 - k])
        k += 1
    return vectors[:, vectors.shape[1] - k :]


def moments(model, data):
    """Second moments of the inputs of both layers, in float64."""
    twin = copy.deepcopy(model).double()
    x = torch.cat([batch[0].double() for batch in data])
    hidden = torch.tanh(twin[0](x)).detach()
    return [x.T @ x, hidden.T @ hidden]


def test_bases_are_those_of_the_class_tokens():
    """Of two tasks: Ψ from the features before it and outside Φ; Φ takes in Ψ and what the learned features need."""
    method = DualLora(net(), CONFIG)
    for number in range(2):
        phis = [phi.double() for phi in method.bases]
        before = moments(method.model, task(number))
        trained(method, number)
        psis = [slot.adapter.residuals[-1] for slot in method.slots]
        for phi, moment, found in zip(phis, before, psis, strict=True):
            psi = leading(moment, phi, 0.7, most=2)
            got = found.basis.double()
            assert got.shape == psi.shape
            assert (got @ got.T - psi @ psi.T).abs().max() < 1e-4  # eigenvectors of float32 sums
            assert torch.linalg.matrix_norm(got.T @ phi) < 1e-6
            share = float(torch.trace(psi.T @ moment @ psi) / torch.trace(moment))
            assert found.share == pytest.approx(share, rel=1e-4)
        after = moments(method.model, task(number))
        method.after_task(task(number))
        for phi, psi, moment, now in zip(phis, psis, after, method.bases, strict=True):
            wider = torch.cat([phi, psi.basis.double()], dim=1)
            assert torch.equal(now[:, : wider.shape[1]].double(), wider)
            expected = torch.cat([wider, leading(moment, wider, 0.7)], dim=1)
            assert now.shape == expected.shape
            assert (now.double() @ now.double().T - expected @ expected.T).abs().max() < 1e-4


def test_whatever_the_optimizer_does_both_stay_where_they_belong():
    method = trained(DualLora(net(), CONFIG), 0)
    method.after_task(task(0))
    method.before_task(task(1), loss_fn)
    optimizer = torch.optim.AdamW(method.trainable_parameters(), lr=0.1)  # knows of no basis
    for batch in task(1) * 3:
        optimizer.zero_grad()
        loss_fn(method.model, batch).backward()
        optimizer.step()
    for slot, phi in zip(method.slots, method.bases, strict=True):
        made, weight = slot.adapter, slot.weight.detach().double().clone()
        inside = made.residuals[-1]
        a, psi = inside.down().detach().double(), inside.basis.double()
        assert torch.linalg.matrix_norm(a - a @ psi @ psi.T) < 1e-6 * torch.linalg.matrix_norm(a)
        merged = slot.exact_weight.double() + (made.B @ made.down()).double().detach() * made.scaling
        change = merged - weight
        assert torch.linalg.matrix_norm(change @ phi.double()) < 1e-6 * torch.linalg.matrix_norm(change)
    learned = method.model(task(1)[0][0])
    method.after_task(task(1))
    torch.testing.assert_close(method.model(task(1)[0][0]), learned, rtol=1e-5, atol=1e-5)


def test_earlier_residual_adapters_stay_as_they_were():
    method = trained(DualLora(net(), CONFIG), 0)
    method.after_task(task(0))
    kept = [slot.adapter.residuals[0].down().clone() for slot in method.slots]
    assert not any(p.requires_grad for p in method.model.parameters())
    trained(method, 1)
    assert len({id(p) for p in method.trainable_parameters()}) == 4 * len(method.slots)
    method.after_task(task(1))
    assert all(torch.equal(a, slot.adapter.residuals[0].down()) for a, slot in zip(kept, method.slots, strict=True))


def test_opening_a_task_changes_no_output():
    method, x = trained(DualLora(net(), CONFIG), 0), torch.randn(5, 12)
    method.after_task(task(0))
    before = method.model(x)
    method.before_task(task(1), loss_fn)
    torch.testing.assert_close(method.model(x), before, rtol=1e-6, atol=1e-6)


def test_a_full_space_is_named_and_goes_on():
    config = DualLoraConfig(r=2, target_modules="all-linear", feature_energy=1.0)
    method = trained(DualLora(net(), config), 0)
    method.after_task(task(0))
    assert [phi.shape[1] for phi in method.bases] == [12, 16]
    with pytest.warns(UserWarning, match=r"2 of 2 layers .*: 0, 2"):
        method.before_task(task(1), loss_fn)
    assert method.trainable_parameters() == []
    learned = method.model(task(1)[0][0])
    method.after_task(task(1))
    assert torch.equal(method.model(task(1)[0][0]), learned)


def test_errors_change_nothing():
    method = trained(DualLora(net(), CONFIG), 0)
    method.slots[0].adapter.residuals[0].R.data[0, 0] = float("nan")
    before = {k: v.clone() for k, v in method.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"must be finite, got NaN or Inf \[0\]"):
        method.after_task(task(0))
    assert all(torch.equal(before[k].nan_to_num(), v.nan_to_num()) for k, v in method.model.state_dict().items())
    with pytest.raises(ValueError, match="at least one batch"):
        DualLora(net(), CONFIG).before_task([], loss_fn)


def calibration(strength=1.0):
    torch.manual_seed(4)
    head = TaskCalibration(strength).eval()
    for i, psi in enumerate(spanned(6, 2, 2, 1)):
        tokens = torch.tensor([[i, 0], [i, 1]])
        head.tasks.append(KnownTask(tokens, psi, [0.6, 0.3, 0.1][i]))
    return head


TOKENS = torch.tensor([[0, 0], [1, 1], [2, 0], [9, 9], [0, 1]])  # the fourth class is of no task


def test_classes_of_unlikely_tasks_lose():
    head, images, logits = calibration(2.0), torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 5).double()
    found = head(logits, images, TOKENS)
    for f, before, after in zip(images, logits, found, strict=True):
        distances = [
            float((f - f @ entry.basis @ entry.basis.T).square().sum() / f.square().sum()) / entry.rest
            for entry in head.tasks
        ]
        p = [math.exp(-d) / sum(math.exp(-other) for other in distances) for d in distances]
        confidence = 1 + sum(value * math.log(value) for value in p) / math.log(3)
        assert 0 < confidence < 1
        for c, owner in enumerate((0, 1, 2, None, 0)):
            shift = 0.0 if owner is None else -2 * confidence * (distances[owner] - min(distances))
            assert after[c].item() == pytest.approx(before[c].item() + shift, abs=1e-12)


def test_nothing_is_calibrated_in_training_or_where_one_task_is_scored():
    head, images, logits = calibration(), torch.randn(4, 6), torch.randn(4, 2)
    for tokens in (TOKENS[[0, 4]], TOKENS[[3, 3]]):
        assert head(logits, images, tokens) is logits
    assert head.train()(logits, images, TOKENS[:2]) is logits
    assert calibration(0.0)(logits, images, TOKENS[:2]) is logits


@pytest.fixture(scope="module")
def learned():
    """Two tasks of images and texts, learned."""
    tasks = [tiny_workload.task(n) for n in range(2)]
    model = tiny_workload.model()
    method = DualLora(model, DualLoraConfig(r=2, alpha=2.0, feature_energy=0.9))
    for chosen in tasks:
        data = loader(chosen.train, chosen.tokens, 16, seed=0)
        method.before_task(data, classification_loss)
        optimizer = method.optimizer(lr=1e-2)
        for batch in [batch for _ in range(3) for batch in data]:
            optimizer.zero_grad()
            classification_loss(model, batch).backward()
            optimizer.step()
        method.after_task(data)
    return method, tasks


def test_a_clip_is_evaluated_without_a_task(learned):
    method, tasks = learned
    plain = tiny_workload.model()
    for chosen in tasks:
        assert accuracy(method.model, chosen) > accuracy(plain, chosen)
        assert accuracy(method.model, chosen, batch_size=1) == accuracy(method.model, chosen)
    weights = []
    slot = next(s for s in method.slots if s.target.tower == "vision" and s.target.depth == 1)
    handle = slot.adapter.register_forward_pre_hook(lambda made, args: weights.append(made.weights(args[0]).mean(0)))
    for chosen in tasks:
        accuracy(method.model, chosen)
    handle.remove()
    assert weights[1][1] > weights[0][1]  # the second task's adapter counts more for its own images


def test_tasks_are_told_apart_where_classes_of_both_are_scored(learned):
    method, tasks = learned
    known = method.head.known()
    assert [entry.tokens.tolist() for entry in known] == [chosen.tokens.tolist() for chosen in tasks]
    method.model.eval()
    for number, chosen in enumerate(tasks):
        with torch.no_grad():
            features = method.model.encode_image(normalize(chosen.test.images), normalize=True)
        assert (method.head.distances(features).argmin(1) == number).double().mean() > 0.6


def test_a_clip_state_is_restored_bitwise(learned):
    method, tasks = learned
    state = method.state()
    other = DualLora(tiny_workload.model(), method.config)
    other.load_state(state)
    again = other.state()
    assert again.meta == state.meta
    assert all(torch.equal(again.tensors[k], v) for k, v in state.tensors.items())
    both = torch.cat([chosen.tokens for chosen in tasks])
    batch = Batch(tasks[1].test.images, tasks[1].test.labels + 3, both)
    with torch.no_grad():
        assert torch.equal(*(classification_loss(m.model.eval(), batch) for m in (method, other)))
    damaged = copy.deepcopy(state)
    del damaged.tensors["identity.1.basis"]
    fresh = DualLora(tiny_workload.model(), method.config)
    with pytest.raises(ValueError, match=r"identity\.1\.basis must have shape"):
        fresh.load_state(damaged)
    assert all(slot.adapter is None for slot in fresh.slots)
    with pytest.raises(ValueError, match=r"identities must be a list of numbers in \(0, 1\], got None"):
        fresh.load_state(type(state)(state.tensors, {**state.meta, "identities": None}))


def test_image_features_of_several_processes_are_added_up(monkeypatch):
    class Other:
        """Another process with the same images and one more class."""

        prompts = ((0, 1), (0, 2))

        def gather(self, mine):
            return [mine, list(self.prompts)]

        def add(self, moment):
            moment *= 2

    monkeypatch.setattr("keeplora.methods.duallora.calibration.processes", Other)
    features, images = ImageFeatures(), torch.randn(4, 3)
    with pytest.raises(ValueError, match="every process must"):
        features.add_up()
    features.observe(images, torch.tensor([[0, 1]]))
    features.add_up()
    torch.testing.assert_close(features.moment, 2 * images.double().T @ images.double())
    assert [row.tolist() for row in features.prompts.values()] == [[0, 1], [0, 2]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_energy": 0.0}, "feature_energy .*got 0.0"),
        ({"calibration": -1.0}, "calibration .*got -1.0"),
        ({"r": 0}, "DualLoraConfig: r .*got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DualLoraConfig(**settings)


def test_names_of_bases_are_checked():
    with pytest.raises(ValueError, match=r"basis: name must .*got 'x'"):
        DualLora(net(), CONFIG).basis("x")
