"""A LoRA that was trained before keeplora came stays an adapter while later tasks keep out of what it reads."""

import pytest
import torch
from peft import PeftModel
from stock_peft import CONFIG, WIDTH, adapter_layers, logits, lora, loss_fn, net, stock, task, train

import keeplora


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def factors(model, name):
    return {
        path: (layer.lora_A[name].weight.detach().clone(), layer.lora_B[name].weight.detach().clone())
        for path, layer in adapter_layers(model, name).items()
    }


def old_one():
    """A stock model with a trained adapter, ``default``."""
    model = stock()
    train(model, task(1))
    return model


def add(model, *kept, name="new"):
    model.add_adapter(name, lora())
    model.base_model.set_adapter([*kept, name])


def learn(model, state, seed, **options):
    keeplora.initialize(model, task(seed), loss_fn, state)
    train(model, task(seed))
    return keeplora.update_subspace(model, task(seed), state, **options)


def test_the_old_adapter_is_kept_and_what_it_reads_is_not_touched():
    model = old_one()
    old, before = factors(model, "default"), logits(model)
    state = keeplora.keep_adapter(model, config=CONFIG)
    assert torch.equal(logits(model), before)
    assert (state.kept, state.tasks_learned) == (("default",), 1)
    add(model, "default")
    certificate = learn(model, state, 2, merge=False)
    assert certificate.leak == certificate.leak_after_rounding <= 1e-6  # nothing was rounded
    now = factors(model, "default")
    for path, (a, b) in old.items():
        assert torch.equal(now[path][0], a)
        assert torch.equal(now[path][1], b)
        new_a, new_b = (factor.double() for factor in factors(model, "new")[path])
        assert new_b.abs().max() > 0
        q = state.bases[path.removeprefix("base_model.model.")].double()
        q_old = torch.linalg.qr(a.double().T).Q
        assert (new_a @ q_old).norm() <= 1e-6 * new_a.norm()  # A_new Q_old = 0
        assert (q_old - q @ (q.T @ q_old)).abs().max() <= 1e-6  # its span is protected
        inside = torch.randn(5, len(a), dtype=torch.float64) @ a.double()
        assert (inside @ new_a.T @ new_b.T).norm() <= 1e-6 * (inside @ a.double().T @ b.double().T).norm()
    model.base_model.set_adapter("default")
    assert torch.equal(logits(model), before)


def test_outputs_for_the_old_tasks_inputs_stay_where_they_are_given():
    """With batches of the old task, all that its inputs span in the first layer is mapped as before."""
    moved = []
    for loader in (None, task(1)):
        model = old_one()
        whole = keeplora.KeepLoraConfig(weight_energy=0.3, feature_energy=0.9999)
        given = {"loader": loader, "loss_fn": loss_fn} if loader else {}
        state = keeplora.keep_adapter(model, config=whole, **given)
        add(model, "default")
        learn(model, state, 2, merge=False)
        layer = model.base_model.model.blocks[0].up
        x = task(1)[0][0]
        with torch.no_grad():
            change = layer.lora_B["new"](layer.lora_A["new"](x)) * layer.scaling["new"]
            moved.append((change.norm() / layer(x).norm()).item())
    assert moved[1] < 1e-2 < moved[0]


def test_both_are_exported_as_one_and_each_by_peft(tmp_path):
    model = old_one()
    state = keeplora.keep_adapter(model, config=CONFIG)
    add(model, "default")
    learn(model, state, 2, merge=False)
    learned = logits(model)
    state.export_peft(tmp_path / "both", model)
    both = PeftModel.from_pretrained(net(), tmp_path / "both")
    assert {layer.r["default"] for layer in adapter_layers(both).values()} == {8}
    same(logits(both), learned)
    model.save_pretrained(tmp_path / "each")
    each = PeftModel.from_pretrained(net(), tmp_path / "each")
    each.load_adapter(tmp_path / "each" / "new", "new")
    each.base_model.set_adapter(["default", "new"])
    same(logits(each), learned)
    with pytest.raises(ValueError, match="export_peft: model must be the PeftModel with adapter 'default', got Net"):
        state.export_peft(tmp_path / "none", net())


def test_a_merged_task_beside_a_kept_adapter_is_in_the_export(tmp_path):
    model = old_one()
    state = keeplora.keep_adapter(model, config=CONFIG)
    add(model, "default")
    learn(model, state, 2)  # merged into the base; the old adapter is not
    learned = logits(model)
    state.export_peft(tmp_path, model)
    same(logits(PeftModel.from_pretrained(net(), tmp_path)), learned)


def test_a_run_that_was_saved_goes_on(tmp_path):
    model = old_one()
    state = keeplora.keep_adapter(model, config=CONFIG)
    model.save_pretrained(tmp_path)
    state.save(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)
    loaded = keeplora.SubspaceState.load(tmp_path)
    loaded.restore(again)
    for one, its in ((model, state), (again, loaded)):
        torch.manual_seed(7)
        add(one, "default")
        learn(one, its, 2, merge=False)
    assert torch.equal(logits(again), logits(model))
    assert loaded.certificates == state.certificates
    assert loaded.certificates[0] is None


def test_two_old_adapters_and_depth():
    """The second joins a state; the new one gets the depth factors though its alpha is the old ones'."""
    model = old_one()
    model.add_adapter("second", lora(init_lora_weights=False))
    model.base_model.set_adapter("default")
    state = keeplora.keep_adapter(model, config=CONFIG)
    model.base_model.set_adapter(["default", "second"])
    assert keeplora.keep_adapter(model, state) is state
    assert state.kept == ("default", "second")
    for name, q in state.bases.items():
        for adapter in state.kept:
            a = factors(model, adapter)[f"base_model.model.{name}"][0].double()
            assert (a - a @ q.double() @ q.double().T).abs().max() <= 2e-6 * a.abs().max()
        assert (q.double().T @ q.double() - torch.eye(q.shape[1])).abs().max() <= 5e-6
        assert q.shape[1] < WIDTH or "down" in name
    alone = stock()
    keeplora.initialize(alone, task(3), loss_fn, config=CONFIG)
    add(model, "default", "second")
    keeplora.initialize(model, task(3), loss_fn, state)
    expected = {path: layer.scaling["default"] for path, layer in adapter_layers(alone).items()}
    assert {path: layer.scaling["new"] for path, layer in adapter_layers(model, "new").items()} == expected
    assert len(set(expected.values())) > 1


def test_what_cannot_be_kept_is_refused():
    fresh = stock()
    with pytest.raises(ValueError, match=r"keep_adapter: adapter 'default' must be trained, got B = 0"):
        keeplora.keep_adapter(fresh)
    model = old_one()
    with pytest.raises(ValueError, match="loader and loss_fn must be given together"):
        keeplora.keep_adapter(model, loader=task(1))
    with pytest.raises(TypeError, match="keep_adapter: state must be"):
        keeplora.keep_adapter(model, CONFIG)
    state = keeplora.initialize(fresh, task(1), loss_fn, config=CONFIG)
    with pytest.raises(RuntimeError, match="keep_adapter: the previous task must be closed first"):
        keeplora.keep_adapter(fresh, state)
    half = stock(net(), use_dora=True)
    with pytest.raises(ValueError, match="keep_adapter: use_dora"):
        keeplora.keep_adapter(half)


def test_another_config_than_the_states_is_refused():
    model = old_one()
    state = keeplora.keep_adapter(model, config=CONFIG)
    add(model, "default")
    train(model, task(2))
    with pytest.raises(ValueError, match="keep_adapter: config must be the state's"):
        keeplora.keep_adapter(model, state, adapter_name="new", config=keeplora.KeepLoraConfig(weight_energy=0.11))
