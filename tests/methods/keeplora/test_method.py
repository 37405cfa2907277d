"""KeepLora on a small model: what it promises after every task, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from keeplora import KeepLora, KeepLoraConfig, StateError

WIDTH = 12


class Net(nn.Module):
    """Three attention blocks and a head: q, k, v, out_proj and fc per block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, 2, batch_first=True), "fc": nn.Linear(WIDTH, WIDTH)})
            for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["attn"](x, x, x, need_weights=False)[0]
            x = x + torch.relu(block["fc"](x))
        return self.head(x.mean(1))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def task(seed, batches=4):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    xs = [torch.randn(16, 5, WIDTH, generator=generator) @ mix for _ in range(batches)]
    return [(x, (x.mean(1)[:, :3]).argmax(1)) for x in xs]


def train(keeper, data, steps=12, lr=1e-2):
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        loss_fn(keeper.model, data[step % len(data)]).backward()
        optimizer.step()


SETTINGS = {
    "r": 3,
    "alpha": 6.0,
    "target_modules": ["attn", "fc"],
    "weight_energy": 0.5,
    "feature_energy": 0.6,
    "depth_scale": 0.2,
}


def keeper_of(model=None, **changes):
    return KeepLora(model or Net(), KeepLoraConfig(**{**SETTINGS, **changes}))


def weights(keeper):
    return {slot.name: slot.weight.detach().clone() for slot in keeper.slots}


@pytest.mark.parametrize("init_b", ["zero", "gradient"])
def test_creating_adapters_changes_no_output_bit(init_b):
    keeper, data = keeper_of(init_b=init_b), task(0)
    x = data[0][0]
    before = keeper.model(x)
    keeper.before_task(data, loss_fn)
    assert torch.equal(keeper.model(x), before)
    if init_b == "gradient":
        assert all(p.abs().max() > 0 for p in keeper.trainable_parameters())


@pytest.mark.parametrize("init_b", ["zero", "gradient"])
def test_guarantees_over_five_tasks(init_b):
    keeper = keeper_of(init_b=init_b)
    for index in range(5):
        data = task(index)
        keeper.before_task(data, loss_fn)
        frozen = {n: p.detach().clone() for n, p in keeper.model.named_parameters() if not p.requires_grad}
        bases = {slot.name: keeper.basis(slot.name) for slot in keeper.slots}
        train(keeper, data)
        now = dict(keeper.model.named_parameters())
        assert all(torch.equal(now[name], value) for name, value in frozen.items())
        x = data[0][0]
        before, unmerged = weights(keeper), keeper.model(x)
        certificate = keeper.after_task(data)
        merged = keeper.model(x)
        assert (merged - unmerged).abs().max() <= 1e-5 * unmerged.abs().max()
        for slot, layer in zip(keeper.slots, certificate.layers, strict=True):
            q = bases[slot.name].double().numpy()
            change = (slot.weight.detach().double() - before[slot.name].double()).numpy()
            new = keeper.basis(slot.name).double().numpy()
            # the numbers in the certificate are those of the matrices themselves
            leak = np.linalg.norm(change @ q) / np.linalg.norm(change)
            assert layer.leak_after_rounding == pytest.approx(leak, rel=1e-6)
            assert np.array_equal(new[:, : q.shape[1]], q)
            assert np.abs(new.T @ new - np.eye(new.shape[1])).max() <= 5e-6
            assert layer.protected == new.shape[1] == WIDTH - layer.free
        assert certificate.leak <= 1e-6
        assert certificate.orthogonality <= 5e-6
        assert certificate.captured >= 0.6 - 1e-5
        assert str(certificate).startswith(
            f"task {index + 1}: leak {certificate.leak_after_rounding:.1e} in the stored"
        )
    assert keeper.tasks_learned == 5


def test_protected_inputs_are_mapped_as_before():
    keeper, data = keeper_of(), task(0)
    keeper.before_task(data, loss_fn)
    bases = {slot.name: keeper.basis(slot.name) for slot in keeper.slots}
    before = weights(keeper)
    train(keeper, data, steps=30)
    keeper.after_task(data)
    for slot in keeper.slots:
        q, x = bases[slot.name].double(), torch.randn(7, bases[slot.name].shape[1], dtype=torch.float64)
        inside = x @ q.T
        moved = inside @ (slot.weight.double() - before[slot.name].double()).T
        assert moved.norm() <= 1e-5 * (inside @ before[slot.name].double().T).norm()
        assert (slot.weight - before[slot.name]).norm() > 0


def test_scaling_is_alpha_over_r_times_the_depth_scale():
    keeper, data = keeper_of(depth_scale=0.2), task(0)
    keeper.before_task(data, loss_fn)
    factors = [slot.adapter.scaling for slot in keeper.slots]
    # generic models count each linear or attention module as one depth: attn, fc, attn, fc, attn, fc
    lambdas = [0.2 + 0.8 * i / 5 for i in range(6)]
    expected = [2.0 * lam for lam in lambdas for _ in range(4 if lambdas.index(lam) % 2 == 0 else 1)]
    assert factors == pytest.approx(expected)
    assert keeper_of(alpha=6.0, rslora=True).config.scaling == pytest.approx(6 / 3**0.5)


def test_a_is_the_top_of_the_projected_gradient():
    model = Net()
    keeper, data = keeper_of(copy.deepcopy(model)), task(3)
    keeper.before_task(data, loss_fn)
    double = model.double()
    for x, y in data:
        (loss_fn(double, (x.double(), y)) / len(data)).backward()
    for block, name in ((0, "blocks.0.fc"), (2, "blocks.2.fc")):
        slot = next(s for s in keeper.slots if s.name == name)
        weight, gradient = (
            model.blocks[block]["fc"].weight.detach().numpy(),
            model.blocks[block]["fc"].weight.grad.numpy(),
        )
        _, s, vt = np.linalg.svd(weight)
        k = int(np.searchsorted(np.cumsum(s**2), 0.5 * (s**2).sum()) + 1)
        projected = gradient @ (np.eye(WIDTH) - vt[:k].T @ vt[:k])
        top = np.linalg.svd(projected)[2][:3]
        a = slot.adapter.A.detach().double().numpy()
        a /= np.linalg.norm(a[0])  # of one length, which is test_balance.py's
        assert keeper.basis(name).shape[1] == k
        assert np.linalg.norm(a @ top.T, 2) == pytest.approx(1, abs=1e-5)
        assert np.linalg.svd(a @ top.T)[1].min() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("phase", ["before", "training", "between"])
def test_save_load_continue_equals_never_having_stopped(phase, tmp_path):
    start = Net()
    whole = keeper_of(copy.deepcopy(start))
    first, second = task(0), task(1)

    def part_one(keeper):
        if phase != "before":
            keeper.before_task(first, loss_fn)
        if phase == "between":
            train(keeper, first)
            keeper.after_task(first)

    def part_two(keeper):
        if phase == "before":
            keeper.before_task(first, loss_fn)
        if phase != "between":
            train(keeper, first)
            keeper.after_task(first, loss_fn)
        keeper.before_task(second, loss_fn)
        train(keeper, second)
        return keeper.after_task(second)

    part_one(whole)
    whole.save(tmp_path / "state")
    loaded = KeepLora.load(tmp_path / "state", copy.deepcopy(start))
    assert loaded.config == whole.config
    assert part_two(loaded) == part_two(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(loaded).values(), weights(whole).values(), strict=True))
    assert loaded.capacity() == whole.capacity()


def test_merge_gives_back_plain_layers_with_what_was_learned():
    model = Net()
    model.head.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    keeper, data = keeper_of(model), task(0)
    keeper.before_task(data, loss_fn)
    train(keeper, data)
    with pytest.raises(RuntimeError, match="merge: the open task must"):
        keeper.merge()
    keeper.after_task(data)
    expected = model(data[0][0])
    assert keeper.merge() is model
    assert type(model.blocks[0]["fc"]) is nn.Linear
    assert type(model.blocks[0]["attn"]) is nn.MultiheadAttention
    assert torch.equal(model(data[0][0]), expected)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    with pytest.raises(RuntimeError, match="given its model back"):
        keeper.before_task(data, loss_fn)


def test_full_layers_are_skipped_with_a_warning_that_names_them():
    keeper, data = keeper_of(weight_energy=1.0), task(0)
    with pytest.warns(UserWarning, match=r"15 of 15 layers .*blocks.0.attn.q_proj"):
        keeper.before_task(data, loss_fn)
    assert keeper.trainable_parameters() == []
    assert keeper.after_task(data).leak == 0
    assert all(row.free == 0 for row in keeper.capacity())


def test_less_room_than_r_uses_what_is_left():
    model = Net()
    keeper, data = keeper_of(model, r=6, weight_energy=0.9, target_modules=["blocks.0.fc"]), task(0)
    with pytest.warns(UserWarning, match=r"1 of 1 layers have fewer than r = 6 useful free directions"):
        keeper.before_task(data, loss_fn)
    [slot] = keeper.slots
    assert slot.adapter.rank == WIDTH - keeper.basis(slot.name).shape[1] < 6


def test_bfloat16_layers_keep_their_exact_weights():
    keeper = keeper_of(Net().bfloat16())
    data = [(x.bfloat16(), y) for x, y in task(0)]
    keeper.before_task(data, loss_fn)
    bases = {slot.name: keeper.basis(slot.name).double() for slot in keeper.slots}
    before = {slot.name: slot.exact_weight.double() for slot in keeper.slots}
    train(keeper, data)
    certificate = keeper.after_task(data)
    assert certificate.leak <= 1e-6
    assert certificate.leak_after_rounding > 1e-4  # and says so
    for slot in keeper.slots:
        change = slot.exact_weight.double() - before[slot.name]
        assert (change @ bases[slot.name]).norm() <= 1e-4 * change.norm()
        assert torch.equal(slot.weight, slot.exact_weight.bfloat16())


def test_parity_settings_run():
    keeper, data = keeper_of(weight_side="output", feature_statistic="slot_mean", target_modules=["fc"]), task(0)
    keeper.before_task(data, loss_fn)
    train(keeper, data)
    assert keeper.after_task(data).leak <= 1e-6


def test_energies_by_tower():
    config = KeepLoraConfig(weight_energy={"vision": 0.5}, depth_scale={"vision": 0.2})
    assert (config.weight_energy_of("text"), config.depth_scale_of("text")) == (0.0, 1.0)  # a tower without a number
    keeper, data = keeper_of(weight_energy={"model": 0}, feature_energy={"model": 0.5}), task(0)
    keeper.before_task(data, loss_fn)
    assert all(row.protected == 0 for row in keeper.capacity())
    assert keeper.after_task(data).captured >= 0.5 - 1e-5


def snapshot(keeper):
    state = keeper.state()
    flags = [p.requires_grad for p in keeper.model.parameters()]
    return state.meta, {k: v.clone() for k, v in state.tensors.items()}, flags


def same(a, b):
    return (
        a[0] == b[0]
        and a[2] == b[2]
        and a[1].keys() == b[1].keys()
        and all(torch.equal(a[1][k], b[1][k]) for k in a[1])
    )


def test_failures_leave_everything_as_it_was():
    keeper, data = keeper_of(), task(0)
    broken = [*data, (torch.full((4, 5, WIDTH), float("nan")), torch.zeros(4, dtype=torch.long))]
    fresh = snapshot(keeper)
    for loader, loss, error in (
        ([], loss_fn, ValueError),
        (broken, loss_fn, ValueError),
        (data, lambda m, b: m(b[0]), ValueError),
        (data, lambda m, b: loss_fn(m, b).detach(), RuntimeError),
        (data, None, TypeError),
    ):
        with pytest.raises(error):
            keeper.before_task(loader, loss)
        assert same(snapshot(keeper), fresh)
    keeper.before_task(data, loss_fn)
    train(keeper, data)
    trained = snapshot(keeper)
    for loader in ([], broken):
        with pytest.raises(ValueError, match=r"^after_task: (loader|features) must"):
            keeper.after_task(loader)
        assert same(snapshot(keeper), trained)
    keeper.after_task(data)


def test_order_of_calls():
    keeper, data = keeper_of(), task(0)
    with pytest.raises(RuntimeError, match=r"after_task: a task must be open, got none. Call before_task"):
        keeper.after_task(data)
    with pytest.raises(RuntimeError, match="trainable_parameters: a task must be open"):
        keeper.trainable_parameters()
    keeper.before_task(data, loss_fn)
    with pytest.raises(RuntimeError, match="previous task must"):
        keeper.before_task(data, loss_fn)
    keeper.after_task(data)
    with pytest.raises(RuntimeError, match="after_task: a task must be open"):
        keeper.after_task(data)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"r": 0}, ValueError, "KeepLoraConfig: r .*got 0"),
        ({"r": 2.0}, TypeError, "KeepLoraConfig: r .*got 2.0"),
        ({"r": 13}, ValueError, r"r must be at most the layer's width, got 13 for 12 \[blocks.0.attn.q_proj\]"),
        ({"alpha": 0.0}, ValueError, "alpha .*got 0.0"),
        ({"depth_scale": 1.5}, ValueError, "depth_scale .*got 1.5"),
        ({"weight_energy": {"model": -0.1}}, ValueError, r"weight_energy .*got -0.1 \[model\]"),
        ({"feature_energy": float("nan")}, ValueError, "feature_energy .*got nan"),
        ({"feature_energy": "0.9"}, TypeError, "feature_energy .*got '0.9'"),
        ({"weight_side": "left"}, ValueError, "weight_side must be one of input, output, got 'left'"),
        ({"alpha": "6"}, TypeError, "alpha must be a number, got '6'"),
        ({"target_modules": [1]}, TypeError, r"target_modules must be names, got \(1,\)"),
        ({"depth_scale": {"visual": 0.2}}, ValueError, r"must name towers of the model \(model\), got visual"),
        ({"feature_energy": {}}, ValueError, r"feature_energy .*got \{\}"),
        ({"feature_energy": {"text": 0.5}}, ValueError, "feature_energy must name towers of the model .*got text"),
        ({"towers": ()}, ValueError, r"towers .*got \(\)"),
        ({"init_b": "svd"}, ValueError, "init_b must be one of zero, gradient, got 'svd'"),
        ({"target_modules": ["q_prj"]}, ValueError, "Nearest names: .*q_proj"),
        ({"weight_side": "output", "target_modules": ["head"]}, None, ""),
    ],
)
def test_bad_settings(changes, error, message):
    model = Net()
    kinds = [type(m) for m in model.modules()]
    if error is None:  # only known when the weights are looked at
        keeper = keeper_of(model, **changes)
        with pytest.raises(ValueError, match='must be square for side="output"'):
            keeper.before_task(task(0), loss_fn)
        return
    with pytest.raises(error, match=message):
        keeper_of(model, **changes)
    assert [type(m) for m in model.modules()] == kinds


def test_states_of_other_models_are_refused(tmp_path):
    keeper_of().save(tmp_path)
    other = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    with pytest.raises(ValueError, match="matches none"):
        KeepLora.load(tmp_path, other)
    keeper = keeper_of(target_modules=["fc"])
    before = snapshot(keeper)
    with pytest.raises(StateError, match=r"targets must be those of this model, 3 \(first: blocks\.0\.fc\), got 15"):
        keeper.load_state(keeper_of().state())
    assert same(snapshot(keeper), before)
    incomplete = keeper.state()
    del incomplete.tensors["blocks.0.fc.weight"]
    with pytest.raises(StateError, match=r"blocks\.0\.fc\.weight must have shape \[12, 12\], got None"):
        keeper.load_state(incomplete)
    foreign = Net()
    with pytest.raises(StateError, match="other weights and buffers must"):
        KeepLora.load(tmp_path, foreign)
    assert type(foreign.head) is nn.Linear
    assert type(foreign.blocks[0]["attn"]) is nn.MultiheadAttention
    assert same(snapshot(keeper), before)
    with pytest.raises(ValueError, match="basis: name must"):
        keeper.basis("nowhere")
    with pytest.raises(StateError):
        KeepLora.load(tmp_path / "nothing", Net())


def test_what_is_no_model_and_what_are_no_settings_is_refused():
    with pytest.raises(TypeError, match=r"KeepLora: model must be a torch.nn.Module, got str\. Load the model first"):
        KeepLora("a/model")
    with pytest.raises(TypeError, match=r"config must be a KeepLoraConfig, got builtins.dict\. Make one: KeepLora"):
        KeepLora(nn.Linear(8, 8), {"r": 4})
    with pytest.raises(TypeError, match=r"load: model must be a torch.nn.Module, got str"):
        KeepLora.load(nn.Linear(8, 8), "folder")  # swapped
