"""Bases of weights in half precision, kept in float16: what they span is protected to float32 rounding."""

import pytest
import torch
from torch import nn

from keeplora import KeepLora, KeepLoraConfig, StateError
from keeplora.methods.bases import NamedBases, joined, narrowed

ENERGY = 0.6
SETTINGS = {"r": 3, "target_modules": "all-linear", "weight_energy": ENERGY, "feature_energy": 0.5}


def net(dtype, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 56), nn.ReLU(), nn.Linear(56, 5)).to(dtype)


def task(seed, dtype):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 40, generator=draw).to(dtype), torch.randint(5, (16,), generator=draw)) for _ in range(3)]


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def learn(keeper, seed, dtype):
    keeper.before_task(task(seed, dtype), loss_fn)
    train(keeper, seed, dtype)
    return keeper.after_task(task(seed, dtype), loss_fn)


def train(keeper, seed, dtype):
    optimizer = keeper.optimizer(lr=1e-2)
    for batch in task(seed, dtype):
        loss_fn(keeper.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def kept(keeper):
    return [[part.dtype for part in p.parts] for p in keeper._protected]


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_they_hold_the_weights_directions_and_nothing_leaks(dtype, place):
    keeper = KeepLora(net(dtype), KeepLoraConfig(**SETTINGS, bases=place), progress=False)
    weights = {slot.name: slot.weight.detach().double() for slot in keeper.slots}
    keeper.before_task(task(1, dtype), loss_fn)
    for name, weight in weights.items():
        q = keeper.basis(name).double()
        assert (q.T @ q - torch.eye(q.shape[1])).abs().max() < 2e-7
        _, s, vh = torch.linalg.svd(weight, full_matrices=False)
        true = vh[: int(((s**2).cumsum(0) / (s**2).sum() < ENERGY).sum()) + 1].T
        assert q.shape == true.shape
        assert torch.linalg.matrix_norm(true - q @ (q.T @ true), 2) < 1e-3
        assert (weight @ q).square().sum() / weight.square().sum() > ENERGY - 1e-6
    train(keeper, 1, dtype)
    proof = keeper.after_task(task(1, dtype), loss_fn)
    assert (proof.leak < 1e-6, proof.orthogonality < 5e-6) == (True, True)
    proof = learn(keeper, 2, dtype)
    assert (proof.leak < 1e-6, proof.orthogonality < 5e-6) == (True, True)
    assert kept(keeper) == [[torch.float16, torch.float32, torch.float32]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bases_of_wider_weights_are_kept_as_they_are(dtype):
    keeper = KeepLora(net(dtype), KeepLoraConfig(**SETTINGS), progress=False)
    keeper.before_task(task(1, dtype), loss_fn)
    assert kept(keeper) == [[dtype]] * 2


@pytest.mark.parametrize("opened", [True, False])
def test_a_loaded_state_goes_on_with_the_same_bits(tmp_path, opened):
    dtype = torch.bfloat16
    keeper = KeepLora(net(dtype), KeepLoraConfig(**SETTINGS), progress=False)
    learn(keeper, 1, dtype)
    if opened:
        keeper.before_task(task(2, dtype), loss_fn)
    keeper.save(tmp_path)
    again = KeepLora.load(tmp_path, net(dtype), progress=False)
    for each in (keeper, again):
        if not opened:
            each.before_task(task(2, dtype), loss_fn)
        train(each, 2, dtype)
        each.after_task(task(2, dtype), loss_fn)
    assert again.digest() == keeper.digest()
    assert all(torch.equal(again.basis(slot.name), keeper.basis(slot.name)) for slot in keeper.slots)


@pytest.mark.parametrize("fault", ["wide", "crooked", "twice"])
def test_a_state_with_another_basis_is_refused(fault):
    dtype = torch.bfloat16
    keeper = KeepLora(net(dtype), KeepLoraConfig(**SETTINGS), progress=False)
    learn(keeper, 1, dtype)
    state = keeper.state()
    name = f"{keeper.slots[0].name}.basis.0"
    basis = state.tensors[name]
    changed = basis.clone()
    changed[:, 0] = 0.5 * basis[:, 0] if fault == "crooked" else basis[:, 1]
    state.tensors[name] = basis.float() if fault == "wide" else changed
    with pytest.raises(StateError, match="must be torch.float16" if fault == "wide" else "orthonormal columns"):
        KeepLora(net(dtype), KeepLoraConfig(**SETTINGS), progress=False).load_state(state)


def test_empty_and_whole_bases():
    turned = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    for count in (0, 1, 24):
        q = joined([narrowed(turned[:, :count].float())])
        assert (q.shape, q.dtype) == ((24, count), torch.float32)
        assert count == 0 or (q.T @ q - torch.eye(count)).abs().max() < 5e-7
    bases = NamedBases({"a": (narrowed(turned[:, :4].float()), turned[:, 4:7].float())})
    assert (list(bases), len(bases), bases["a"].shape) == (["a"], 1, (24, 7))
