"""`directions="random"`: adapters in free space that know nothing of the task."""

import pytest
import torch
from torch import nn

from keeplora import KeepLora, KeepLoraConfig

WIDTH, RANK = 24, 4


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def task(seed=0):
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(16, WIDTH, generator=generator) for _ in range(3)]
    return [(x, x[:, :3].argmax(1)) for x in xs]


def keeper_of(**changes):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
    settings = {"r": RANK, "alpha": 8.0, "target_modules": "all-linear", "weight_energy": 0.5, "feature_energy": 0.6}
    return KeepLora(model, KeepLoraConfig(**{**settings, "directions": "random", **changes}))


def started(data=0, **changes):
    keeper = keeper_of(**changes)
    keeper.before_task(task(data), loss_fn)
    return keeper


def factors(keeper):
    return [slot.adapter.A.detach().double().clone() for slot in keeper.slots]


def test_a_is_an_orthonormal_frame_of_free_space_and_the_function_is_unchanged():
    keeper = keeper_of()
    x = torch.randn(5, WIDTH)
    before = keeper.model(x)
    keeper.before_task(task(), loss_fn)
    assert torch.equal(keeper.model(x), before)
    for slot, a in zip(keeper.slots, factors(keeper), strict=True):
        q = keeper.basis(slot.name).double()
        assert q.shape[1] > 0
        assert a.shape == (RANK, WIDTH)
        assert (a @ a.T - torch.eye(RANK)).abs().max() < 1e-6
        assert (a @ q).abs().max() < 1e-6


def test_it_depends_on_seed_and_task_and_not_on_the_data():
    same, other = factors(started(data=0)), factors(started(data=5))
    assert all(torch.equal(a, b) for a, b in zip(same, other, strict=True))
    keeper = keeper_of(seed=1)
    keeper.before_task(task(), loss_fn)
    assert not any(torch.allclose(a, b) for a, b in zip(same, factors(keeper), strict=True))
    first = factors(keeper)
    keeper.after_task(task())
    keeper.before_task(task(), loss_fn)
    assert not any(torch.allclose(a, b) for a, b in zip(first, factors(keeper), strict=True))


def test_the_loader_is_not_read():
    def untouchable():
        raise AssertionError("a pass was made")
        yield

    keeper = keeper_of()
    keeper.before_task(untouchable(), loss_fn)
    assert keeper.training_task


def test_directions_spread_over_all_free_space():
    """The mean of the frames' projections is r / free times the projection on free space."""
    total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    draws = 200
    for seed in range(draws):
        keeper = started(seed=seed)
        a = factors(keeper)[0]
        total += a.T @ a
    q = keeper.basis(keeper.slots[0].name).double()
    free = WIDTH - q.shape[1]
    wanted = (RANK / free) * (torch.eye(WIDTH) - q @ q.T)
    # An entry of one projection has variance below r / free; of the mean over draws, that divided by their number.
    assert (total / draws - wanted).abs().max() < 5 * (RANK / free / draws) ** 0.5


def test_it_retains_as_much_as_gradient_directions():
    keeper = started()
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=1e-2)
    for batch in task() * 3:
        optimizer.zero_grad()
        loss_fn(keeper.model, batch).backward()
        optimizer.step()
    certificate = keeper.after_task(task())
    assert certificate.leak <= 1e-6
    assert max(slot.weight.grad is not None for slot in keeper.slots) == 0


def test_less_room_than_r_uses_what_is_left():
    with pytest.warns(UserWarning, match="free"):
        keeper = started(weight_energy=0.999)
    for slot in keeper.slots:
        free = WIDTH - keeper.basis(slot.name).shape[1]
        found = 0 if slot.adapter is None else slot.adapter.A.shape[0]
        assert found == min(RANK, free)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directions": "random", "init_b": "gradient"}, 'init_b must be "zero" with directions="random"'),
        ({"directions": "chance"}, "directions must be one of gradient, random"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        KeepLoraConfig(**changes)
