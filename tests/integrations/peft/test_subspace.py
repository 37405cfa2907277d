"""keeplora.initialize and update_subspace on a stock PeftModel, held to references that share no code with them."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from stock_peft import CONFIG, adapter_layers, logits, lora, loss_fn, net, stock, task, train
from torch import nn

import keeplora

NAMES = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
DEPTHS = [0.2 + 0.8 * i / 3 for i in range(4)]  # the method's formula, four positions, γ = 0.2


def start(model, data, state=None, **options):
    return keeplora.initialize(model, data, loss_fn, state, config=CONFIG if state is None else None, **options)


def learn(model, seed, state=None, **options):
    state = start(model, task(seed), state)
    train(model, task(seed))
    return state, keeplora.update_subspace(model, task(seed), state, **options)


def layer(model, name, adapter="default"):
    return adapter_layers(model, adapter)[f"base_model.model.{name}"]


def dense(model, name, adapter="default"):
    found = layer(model, name, adapter)
    b, a = found.lora_B[adapter].weight.detach().double(), found.lora_A[adapter].weight.detach().double()
    return found.scaling[adapter] * (b @ a)


def reference_basis(weight, energy):
    _, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    share = (s**2).cumsum(0) / (s**2).sum()
    return vh[: int((share < energy).sum()) + 1].T


def reference_gradient(model, data, name):
    model = copy.deepcopy(model).double()
    weight = model.get_submodule(name).weight
    total = torch.zeros_like(weight)
    for x, y in data:
        total += torch.autograd.grad(nn.functional.cross_entropy(model(x.double()), y), weight)[0]
    return total / len(data)


def reference_moment(model, data, name):
    model, seen = copy.deepcopy(model).double(), []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for x, _ in data:
        model(x.double())
    x = torch.cat(seen)
    return x.T @ x


def test_a_points_where_the_task_wants_to_go_outside_of_what_the_weight_knows():
    plain, model, data = net(), stock(), task(1)
    state = start(model, data)
    assert torch.equal(logits(model), logits(plain))
    for name in NAMES:
        found = layer(model, name)
        a, b = found.lora_A["default"].weight, found.lora_B["default"].weight
        q = reference_basis(plain.get_submodule(name).weight, 0.3)
        assert state.bases[name].shape == q.shape
        g = reference_gradient(plain, data, name)
        g = g - g @ q @ q.T
        best = torch.linalg.svdvals(g)[:4].square().sum()
        rows = a.detach().double() / a.detach().double()[0].norm()  # of one length, which is test_balance.py's
        assert torch.linalg.vector_norm(rows @ q, dim=1).max() <= 1e-6
        assert torch.allclose(rows @ rows.T, torch.eye(4, dtype=torch.float64), atol=1e-6)
        assert 0.9995 <= (g @ rows.T).square().sum() / best <= 1 + 1e-6
        assert (a.requires_grad, b.requires_grad, bool(b.any())) == (False, True, False)
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lora_B" not in n] == []


def test_depth_is_in_the_scaling_and_in_alpha_pattern_so_stock_peft_has_it_too(tmp_path):
    model = stock()
    start(model, task(1))
    for name, depth in zip(NAMES, DEPTHS, strict=True):
        assert layer(model, name).scaling["default"] == pytest.approx(8 / 4 * depth, rel=1e-12)
    train(model, task(1))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert [layer(again, n).scaling for n in NAMES] == [layer(model, n).scaling for n in NAMES]
    assert torch.equal(logits(again), logits(model))


def test_two_tasks_keep_what_is_protected_and_a_base_that_can_be_taken_out():
    plain, model = net(), stock()
    state = start(model, task(1))
    weights = dict(state.bases)
    train(model, task(1))
    before = logits(model)
    first = keeplora.update_subspace(model, task(1), state)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert all(not layer(model, name).lora_B["default"].weight.any() for name in NAMES)
    after_one = copy.deepcopy(model).unload()
    bases = {name: q.double() for name, q in state.bases.items()}
    for name in NAMES:
        moment = reference_moment(after_one, task(1), name)
        captured = (bases[name] * (moment @ bases[name])).sum() / moment.trace()
        assert captured >= 0.8 - 1e-5
        old = weights[name].double()
        rest = moment - old @ (old.T @ moment)
        rest = rest - (rest @ old) @ old.T
        inside = (old * (moment @ old)).sum().expand(1)
        gained = torch.cat([inside, inside + torch.linalg.eigvalsh(rest).flip(0).cumsum(0)])
        assert abs(state.added[name][0] - int((gained < 0.8 * moment.trace()).sum())) <= 1
    state, second = learn(model, 2, state)
    assert [layer(model, n).scaling["default"] for n in NAMES] == pytest.approx([2 * d for d in DEPTHS])  # not twice
    after_two = model.unload()
    for name in NAMES:
        w0, w1, w2 = (m.get_submodule(name).weight.detach().double() for m in (plain, after_one, after_two))
        moved = (w2 - w1).norm()
        assert moved > 1e-3
        for q, change in ((weights[name].double(), w2 - w0), (bases[name], w2 - w1)):
            inputs = q @ torch.randn(q.shape[1], 5, dtype=torch.float64)
            assert (change @ inputs).norm() <= 1e-5 * (w0 @ inputs).norm()
    for certificate in (first, second):
        assert certificate.leak <= 1e-6
        assert certificate.leak_after_rounding <= 1e-5
        assert certificate.orthogonality <= 5e-6
    assert state.capacity()[0].added_by_task == state.added[NAMES[0]]


def test_an_adapter_per_task_instead_of_merging():
    model = stock()
    state, certificate = learn(model, 1, merge=False)
    base = layer(model, NAMES[0]).base_layer.weight.clone()
    first = {name: dense(model, name) for name in NAMES}
    protected = {name: q.double() for name, q in state.bases.items()}
    assert certificate.leak == certificate.leak_after_rounding <= 1e-6
    model.add_adapter("second", lora())
    model.set_adapter("second")
    with pytest.raises(RuntimeError, match=r"exactly default, second must"):
        start(model, task(2), state, adapter_name="second")
    model.base_model.set_adapter(["default", "second"])
    start(model, task(2), state)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.{name}.lora_B.second.weight" for name in NAMES}
    train(model, task(2))
    keeplora.update_subspace(model, task(2), state, merge=False)
    assert state.kept == ("default", "second")
    assert torch.equal(layer(model, NAMES[0]).base_layer.weight, base)
    for name in NAMES:
        assert torch.equal(dense(model, name), first[name])
        change = dense(model, name, "second")
        assert change.norm() > 0
        assert (change @ protected[name]).norm() <= 1e-6 * change.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded_at_any_time_equals_never_having_stopped(tmp_path, dtype):
    """Between tasks and in the middle of one; the base model is always loaded as it was pretrained."""

    def cast_loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0].to(dtype)).float(), batch[1])

    def steps(model, state):
        opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for batch in task(9)[:2]:
            opt.zero_grad()
            cast_loss(model, batch).backward()
            opt.step()

    def stop(model, state, folder):
        model.save_pretrained(folder)
        state.save(folder)
        model = PeftModel.from_pretrained(net().to(dtype), folder, is_trainable=True)
        assert all(found.lora_A["default"].weight.requires_grad for found in adapter_layers(model).values())
        state = keeplora.SubspaceState.load(folder)
        state.restore(model)
        assert not any(found.lora_A["default"].weight.requires_grad for found in adapter_layers(model).values())
        return model, state

    def run(interrupted):
        model, state = get_peft_model(net().to(dtype), lora()), None
        for seed in (1, 2, 3):
            config = CONFIG if state is None else None
            state = keeplora.initialize(model, task(seed), cast_loss, state, config=config)
            steps(model, state)
            if interrupted:
                model, state = stop(model, state, tmp_path / f"open-{seed}")
            steps(model, state)
            keeplora.update_subspace(model, task(seed), state, loss_fn=cast_loss)
            if interrupted:
                fresh = get_peft_model(net().to(dtype), lora())
                state.save(tmp_path / f"closed-{seed}")
                state = keeplora.SubspaceState.load(tmp_path / f"closed-{seed}")
                with pytest.raises(RuntimeError, match=r"Call state\.restore"):
                    keeplora.initialize(fresh, task(seed), cast_loss, state)
                state.restore(fresh)
                model = fresh
        return model.unload().state_dict(), state

    straight, straight_state = run(False)
    resumed, resumed_state = run(True)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())
    assert all(torch.equal(resumed_state.bases[name], q) for name, q in straight_state.bases.items())


def test_a_trained_a_is_found_and_brought_back():
    model = stock()
    state = start(model, task(1))
    with model.disable_adapter():
        logits(model)
    assert layer(model, NAMES[0]).lora_A["default"].weight.requires_grad  # PEFT has unfrozen it
    train(model, task(1))
    with pytest.warns(UserWarning, match=r"4 of 4 A were trained and had left .* call keeplora\.freeze_a") as caught:
        certificate = keeplora.update_subspace(model, task(1), state)
    assert certificate.leak <= 1e-6
    assert {warning.filename for warning in caught} == {__file__}
    start(model, task(2), state)
    model.set_adapter("default")
    keeplora.freeze_a(model)
    assert not layer(model, NAMES[0]).lora_A["default"].weight.requires_grad


def test_other_adapters_and_mixed_ranks_and_alphas_are_left_as_they_are():
    model = stock(rank_pattern={"blocks.1.up": 2}, alpha_pattern={"down": 3}, lora_dropout=0.1)
    model.add_adapter("other", lora(target_modules=["up", "head"], init_lora_weights=False))
    other = {n: p.clone() for n, p in model.named_parameters() if ".other." in n}
    state, certificate = learn(model, 1)
    assert certificate.leak <= 1e-6
    assert [layer(model, n).lora_A["default"].weight.shape[0] for n in NAMES] == [4, 4, 2, 4]
    alphas = [8 * DEPTHS[0], 3 * DEPTHS[1], 8 * DEPTHS[2], 3 * DEPTHS[3]]
    assert [layer(model, n).lora_alpha["default"] for n in NAMES] == pytest.approx(alphas)
    assert state.ranks == dict(zip(NAMES, [4, 4, 2, 4], strict=True))
    assert all(torch.equal(p, other[n]) for n, p in model.named_parameters() if ".other." in n)
    assert not [n for n, p in model.named_parameters() if ".other." in n and p.requires_grad]


def test_little_room_gives_smaller_ranks_and_says_so():
    model = stock()
    config = keeplora.KeepLoraConfig(weight_energy=0.999, feature_energy=0.4)
    with pytest.warns(UserWarning, match=r"have fewer than r = 4 useful|have no free direction left") as caught:
        state = keeplora.initialize(model, task(1), loss_fn, config=config)
    assert {warning.filename for warning in caught} == {__file__}
    train(model, task(1))
    assert keeplora.update_subspace(model, task(1), state).leak <= 1e-6


def test_a_failed_pass_changes_nothing():
    model = stock()
    state, _ = learn(model, 1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    bases = dict(state.bases)
    with pytest.raises(ValueError, match="the loss must be finite"):
        keeplora.initialize(model, task(2), lambda m, b: loss_fn(m, b) * float("nan"), state)
    assert state.open_adapter is None
    start(model, task(2), state)
    train(model, task(2))
    trained = {n: p.clone() for n, p in model.named_parameters() if "lora_B" in n}
    with pytest.raises(ValueError, match="batch"):
        keeplora.update_subspace(model, [], state)
    assert state.bases.keys() == bases.keys()
    assert all(torch.equal(state.bases[n], q) for n, q in bases.items())
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in before.items() if "lora_" not in n)
    assert all(torch.equal(now[n], p) for n, p in trained.items())
    assert type(layer(model, NAMES[0]).base_layer) is nn.Linear


def test_calls_out_of_order():
    model = stock()
    state = start(model, task(1))
    with pytest.raises(RuntimeError, match=r"initialize: the previous task must"):
        start(model, task(1), state)
    with torch.no_grad():
        layer(model, NAMES[0]).base_layer.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"base weights must be those after task 0 .*got [0-9a-f]{12}:"):
        keeplora.update_subspace(model, task(1), state)
    with torch.no_grad():
        layer(model, NAMES[0]).base_layer.weight.sub_(1)
    state.current = state.pretrained = "what the subtraction gives is not the same in every bit"
    with pytest.raises(keeplora.StateError, match="restore: the model's base weights must"):
        state.restore(model)
    model = stock()
    state, _ = learn(model, 1)
    with pytest.raises(RuntimeError, match="update_subspace: a task must be open"):
        keeplora.update_subspace(model, task(1), state)


def test_a_loader_and_a_loss_that_are_swapped_are_named():
    with pytest.raises(TypeError, match=r"initialize: loss_fn must be a function of \(model, batch\), got list"):
        keeplora.initialize(stock(), loss_fn, task(0))


def test_arguments_of_another_kind_are_named():
    model = stock(net())
    with pytest.raises(TypeError, match=r"initialize: state must be a SubspaceState .* got KeepLoraConfig.* config="):
        keeplora.initialize(model, task(1), loss_fn, CONFIG)
    with pytest.raises(TypeError, match=r"initialize: config must be a KeepLoraConfig or None, got dict"):
        keeplora.initialize(model, task(1), loss_fn, config={"r": 2})
    with pytest.raises(TypeError, match=r"update_subspace: state must be the SubspaceState .* got NoneType"):
        keeplora.update_subspace(model, task(1), None)


def test_a_save_writes_only_what_is_new(tmp_path, monkeypatch):
    written = []
    write = keeplora.methods.tensor_files.write_tensors

    def counted(path, tensors):
        written.append(sorted(tensors))
        return write(path, tensors)

    monkeypatch.setattr(keeplora.methods.state, "write_tensors", counted)

    def new(state, folder=tmp_path):
        written.clear()
        state.save(folder)
        return [name for names in written for name in names]

    model = stock()
    state, _ = learn(model, 1)
    first = sorted(f"{n}.{part}" for n in NAMES for part in ("basis.0", "basis.1", "learned.0.A", "learned.0.B"))
    assert new(state) == first
    assert new(state) == []
    state, _ = learn(model, 2, state)
    second = sorted(f"{n}.{part}" for n in NAMES for part in ("basis.2", "learned.1.A", "learned.1.B"))
    assert new(state) == second
    loaded = keeplora.SubspaceState.load(tmp_path)
    assert new(loaded) == []
    assert new(loaded, tmp_path / "elsewhere") == []  # links to the files that there are
    again = keeplora.SubspaceState.load(tmp_path / "elsewhere")
    assert all(torch.equal(again.bases[name], q) for name, q in state.bases.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_half_precision_base_keeps_narrow_bases(tmp_path, dtype):
    model, state = get_peft_model(net().to(dtype), lora()), None

    def cast_loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0].to(dtype)).float(), batch[1])

    for seed in (1, 2):
        state = keeplora.initialize(model, task(seed), cast_loss, state, config=None if state else CONFIG)
        train(model, [(x.to(dtype), y) for x, y in task(seed)])
        assert keeplora.update_subspace(model, task(seed), state).leak <= 1e-6
    kinds = {torch.float32: torch.float32, torch.bfloat16: torch.float16}
    assert {parts[0].dtype for parts in state.parts.values()} == {kinds[dtype]}
    state.save(tmp_path)
    loaded = keeplora.SubspaceState.load(tmp_path)
    assert all(torch.equal(loaded.bases[name], q) for name, q in state.bases.items())
