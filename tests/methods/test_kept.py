"""What is kept between tasks, in memory and on disk: what was merged and protected, and weights of other origin."""

import copy
import shutil

import pytest
import torch
from torch import nn

from keeplora import KeepLora, KeepLoraConfig, load
from keeplora.methods import create
from keeplora.methods.state import SCHEMA, StateError, read_state, write_state

WIDTH, TASKS = 64, 8


def net(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 48)).to(dtype)


def data(number, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(number)
    mix = torch.randn(4, WIDTH, generator=draw)
    return [(torch.randn(16, 4, generator=draw) @ mix).to(dtype) for _ in range(2)]


def squares(model, batch):
    return model(batch).float().square().mean()


def keeper_of(dtype=torch.bfloat16, **settings):
    options = {"r": 2, "target_modules": "all-linear", "weight_energy": 0.2, "feature_energy": 0.5, **settings}
    return KeepLora(net(dtype), KeepLoraConfig(**options))


def learn(method, number, dtype=torch.bfloat16):
    batches = data(number, dtype)
    method.before_task(batches, squares)
    with torch.no_grad():
        for i, parameter in enumerate(method.trainable_parameters()):
            draw = torch.Generator().manual_seed(100 * number + i)
            parameter.normal_(0, 0.02, generator=draw)
    return method.after_task(batches)


def same(one, other):
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(t, other.tensors[n]) for n, t in one.tensors.items()
    )


def size(folder):
    return sum(file.stat().st_size for file in folder.glob("tensors-*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_eight_tasks_on_disk_are_updates_and_bases(tmp_path, dtype):
    keeper = keeper_of(dtype)
    names, written = set(), []
    for number in range(TASKS):
        learn(keeper, number, dtype)
        keeper.save(tmp_path)
        now = {file.name for file in tmp_path.glob("tensors-*")}
        written.append(sum((tmp_path / name).stat().st_size for name in now - names))
        assert names <= now  # nothing is written again
        names = now
    state = read_state(tmp_path)
    assert not [name for name in state.tensors if name.endswith(".weight")]
    factors = sum(4 * 2 * TASKS * sum(slot.weight.shape) for slot in keeper.slots)
    bases = sum(4 * WIDTH * row.protected for row in keeper.capacity())
    assert factors + bases <= size(tmp_path) <= factors + bases + TASKS * 2000
    assert max(written[1:]) < 4 * WIDTH * (2 * 20) + 2 * 4 * 2 * (2 * WIDTH) + 2000
    again = load(tmp_path, net(dtype))
    assert same(again.state(), keeper.state())
    assert learn(again, TASKS, dtype) == learn(keeper, TASKS, dtype)
    for one, other in zip(keeper.slots, again.slots, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.exact_weight, other.exact_weight)
    again.save(tmp_path)  # what the other process wrote is not written again
    assert names <= {file.name for file in tmp_path.glob("tensors-*")}


def test_another_pretrained_model_is_refused_and_left_alone(tmp_path):
    keeper = keeper_of()
    learn(keeper, 0)
    keeper.save(tmp_path)
    other = net()
    with torch.no_grad():
        other[2].weight[3, 4] += 1
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StateError, match=r"pretrained ones .* got others \[2\]"):
        load(tmp_path, other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_float32_model_that_has_learned_needs_a_state_with_its_weights(tmp_path):
    """Its own weights are what it has learned: only a copy in memory can take it back."""
    keeper = keeper_of(torch.float32)
    learn(keeper, 0, torch.float32)
    keeper.save(tmp_path)
    first = keeper.state()
    learn(keeper, 1, torch.float32)
    with pytest.raises(StateError, match="got none, since tasks were merged into them"):
        keeper.load_state(read_state(tmp_path))
    keeper.load_state(first)
    assert same(keeper.state(), first)
    assert same(load(tmp_path, net(torch.float32)).state(), first)
    keeper.save(tmp_path / "again")
    assert not [name for name in read_state(tmp_path / "again").tensors if name.endswith(".weight")]


def test_a_model_in_half_precision_goes_back_to_any_of_its_states(tmp_path):
    keeper = keeper_of()
    learn(keeper, 0)
    keeper.save(tmp_path)
    first = keeper.state()
    learn(keeper, 1)
    keeper.load_state(read_state(tmp_path))
    assert same(keeper.state(), first)


def test_weights_that_somebody_wrote_are_in_the_state(tmp_path):
    keeper = keeper_of()
    learn(keeper, 0)
    with torch.no_grad():
        keeper.model[2].weight.mul_(2)
    weight = keeper.model[2].weight.clone()
    keeper.save(tmp_path)
    assert [name for name in read_state(tmp_path).tensors if name.endswith(".weight")] == ["2.weight"]
    assert torch.equal(load(tmp_path, net()).model[2].weight, weight)


@pytest.mark.parametrize("change", [{"exact_weights": "device"}, {"bases": "device"}])
def test_where_things_are_kept_changes_no_number(change, tmp_path):
    usual, other = keeper_of(), keeper_of(**change)
    for number in range(3):
        assert learn(usual, number) == learn(other, number)
    for one, two in zip(usual.slots, other.slots, strict=True):
        assert torch.equal(one.exact_weight, two.exact_weight)
        assert torch.equal(usual.basis(one.name), other.basis(two.name))
        assert (one.exact.master is None) == (one.exact.start is not None)
        if "exact_weights" in change:
            assert two.exact.start is None
            assert two.exact.master.dtype == torch.float32
    other.save(tmp_path)
    again = load(tmp_path, net())
    assert learn(usual, 3) == learn(again, 3)


def test_a_method_whose_updates_grow_keeps_their_sum():
    """SD-LoRA's update of a task has the rank of all tasks so far: it used to keep them all."""
    model = net(torch.float32)
    method = create("sd-lora", model, {"r": 2, "target_modules": "all-linear"})
    for number in range(12):
        learn(method, number, torch.float32)
    weights = sum(4 * slot.weight.numel() for slot in method.slots)
    kept = sum(4 * t.numel() for slot in method.slots for u in slot.learned for t in (u.a, u.b))
    assert all(slot.exact.total is not None for slot in method.slots)
    assert kept <= 2 * weights
    twin = create("sd-lora", net(torch.float32), {"r": 2, "target_modules": "all-linear"})
    twin.load_state(method.state())
    assert learn(method, 12, torch.float32) == learn(twin, 12, torch.float32)
    assert same(method.state(), twin.state())


def test_an_update_that_leaves_the_dtype_is_refused(tmp_path):
    keeper = keeper_of(torch.float16)
    learn(keeper, 0, torch.float16)
    state = keeper.live_state()
    state.meta["learned"]["0"] = [1e9]
    write_state(tmp_path, state)
    with pytest.raises(StateError, match=r"within torch\.float16, got .*\[0\]"):
        load(tmp_path, net(torch.float16))


def test_states_of_an_older_schema_are_refused(tmp_path):
    keeper = keeper_of()
    keeper.save(tmp_path)
    shutil.copy(tmp_path / "state.json", tmp_path / "kept.json")
    text = (tmp_path / "state.json").read_text().replace(f'"schema": {SCHEMA}', '"schema": 3')
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(StateError, match=rf"must have schema {SCHEMA}, got 3\. It was written by another keeplora"):
        load(tmp_path, net())
