"""KeepLora's updates in stock PEFT, and stock checkpoints in KeepLora."""

import copy
import json
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from stock_peft import WIDTH, adapter_layers, logits, lora, loss_fn, net, stock, task, train
from torch import nn

import keeplora
from keeplora import KeepLora, KeepLoraConfig, StateError
from keeplora.lora import linear_targets

CONFIG = KeepLoraConfig(r=4, alpha=8, target_modules=["up", "down"], weight_energy=0.3, feature_energy=0.8)
SMALL = KeepLoraConfig(r=2, alpha=4, target_modules="all-linear", weight_energy=0.3, feature_energy=0.5)


def learn(keeper, data, loss=loss_fn, close=True):
    keeper.before_task(data, loss)
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=2e-2)
    for batch in [*data, *data]:
        optimizer.zero_grad()
        loss(keeper.model, batch).backward()
        optimizer.step()
    return keeper.after_task(data) if close else None


def same(actual, expected):
    """Two orders of the same float32 sums: relative to the largest logit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_an_open_task_loads_in_stock_peft_with_its_depth_and_its_factors(tmp_path):
    keeper = KeepLora(net(), CONFIG)
    learn(keeper, task(1), close=False)
    keeper.export_peft(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    same(logits(loaded), logits(keeper.model))
    for slot in keeper.slots:
        layer = adapter_layers(loaded)[f"base_model.model.{slot.name}"]
        assert torch.equal(layer.lora_A["default"].weight, slot.adapter.A)
        assert torch.equal(layer.lora_B["default"].weight, slot.adapter.B)
        assert layer.scaling["default"] == pytest.approx(slot.adapter.scaling, rel=1e-12)
    assert (logits(loaded) - logits(net())).abs().max() > 1e-2


def test_all_tasks_are_one_adapter_whose_rank_is_their_sum(tmp_path):
    keeper = KeepLora(net(), CONFIG)
    for seed in (1, 2):
        learn(keeper, task(seed))
    same(logits(_exported(keeper, tmp_path / "closed")), logits(keeper.model))
    learn(keeper, task(3), close=False)
    loaded = _exported(keeper, tmp_path / "open")
    assert {layer.r["default"] for layer in adapter_layers(loaded).values()} == {12}
    same(logits(loaded), logits(keeper.model))
    keeper.export_peft(tmp_path / "third", open_task_only=True)
    keeper.after_task(task(3))
    for seed in (4, 5, 6, 7):  # 28 directions in layers of 24: the rank stays at the layer's
        learn(keeper, task(seed))
    loaded = _exported(keeper, tmp_path / "many")
    assert {layer.r["default"] for layer in adapter_layers(loaded).values()} == {24}
    same(logits(loaded), logits(keeper.model))


def _exported(keeper, folder):
    keeper.export_peft(folder)
    return PeftModel.from_pretrained(net(), folder)


def test_the_open_task_alone_belongs_on_the_merged_model(tmp_path):
    keeper = KeepLora(net(), CONFIG)
    learn(keeper, task(1))
    merged = copy.deepcopy(keeper).merge()
    learn(keeper, task(2), close=False)
    keeper.export_peft(tmp_path, open_task_only=True)
    same(logits(PeftModel.from_pretrained(merged, tmp_path)), logits(keeper.model))


def test_updates_are_in_the_state(tmp_path):
    keeper = KeepLora(net(), CONFIG)
    learn(keeper, task(1))
    keeper.save(tmp_path / "state")
    again = KeepLora.load(tmp_path / "state", net())
    for one in (keeper, again):
        learn(one, task(2))
    same(logits(_exported(again, tmp_path / "adapter")), logits(keeper.model))
    again.slots[0].forget()  # as LiNeS does where it has scaled what was learned
    again.save(tmp_path / "unknown")
    again = KeepLora.load(tmp_path / "unknown", net())
    with pytest.raises(RuntimeError, match=r"export_peft: the updates of every task must be known .*\[blocks\.0\.up\]"):
        again.export_peft(tmp_path / "adapter")
    learn(again, task(2), close=False)
    again.export_peft(tmp_path / "adapter", open_task_only=True)


def test_gradient_start_and_rslora_are_exported_as_what_they_do(tmp_path):
    config = KeepLoraConfig(**{**CONFIG.to_dict(), "init_b": "gradient", "rslora": True, "depth_scale": 0.5})
    keeper = KeepLora(net(), config)
    learn(keeper, task(1), close=False)
    same(logits(_exported(keeper, tmp_path)), logits(keeper.model))


def test_names_that_end_like_others_are_matched_exactly(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, 5)))

    keeper = KeepLora(model(), SMALL, targets=linear_targets(model())[:1])
    learn(keeper, task(1), close=False)
    keeper.export_peft(tmp_path)
    loaded = PeftModel.from_pretrained(model(), tmp_path)
    assert list(adapter_layers(loaded)) == ["base_model.model.0"]
    same(logits(loaded), logits(keeper.model))


# ------------------------------------------------------------------ nn.MultiheadAttention


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = x.view(-1, 1, WIDTH) * torch.linspace(0.5, 1.5, 4).to(x).view(4, 1)
        return self.head(self.attn(x, x, x, need_weights=False)[0].mean(1))


def attention():
    torch.manual_seed(0)
    return Attention()


def reference(state, tensors, config, twice=False):
    """The checkpoint applied to the plain model's weights by hand, in float64: ``W + alpha/r B A``."""
    model = attention().double()
    model.load_state_dict({name: tensor.double() for name, tensor in state.items()})
    for name, weight in model.named_parameters():
        key = {"attn.in_proj_weight": "attn", "attn.out_proj.weight": "attn.base_layer.out_proj"}.get(
            name, name.removesuffix(".weight")
        )
        a = tensors.get(f"base_model.model.{key}.lora_A.weight")
        if a is None:
            continue
        module = key.split(".")[0]
        r = config["rank_pattern"].get(f"^{module}", config["r"])
        alpha = config["alpha_pattern"].get(f"^{module}", config["lora_alpha"])
        assert a.shape[0] == r
        times = 2 if twice and key.endswith("out_proj") else 1
        weight.data += times * alpha / r * tensors[f"base_model.model.{key}.lora_B.weight"].double() @ a.double()
    return model


@pytest.mark.parametrize("names", [["attn"], ["q_proj", "v_proj"], ["out_proj", "head"]], ids=str)
def test_attention_is_one_layer_of_rank_3r_and_stock_peft_applies_out_proj_twice(tmp_path, names):
    from safetensors.torch import load_file

    keeper = KeepLora(attention(), KeepLoraConfig(**{**SMALL.to_dict(), "target_modules": names}))
    learn(keeper, task(1))
    learn(keeper, task(2), close=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keeper.export_peft(tmp_path)
    adapted = names != ["q_proj", "v_proj"]
    assert any("out_proj twice" in str(w.message) for w in caught) is adapted
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    if names == ["attn"]:  # two tasks of rank 2 in each of q, k and v, block by block
        a, b = (tensors[f"base_model.model.attn.lora_{f}.weight"] for f in "AB")
        assert (list(a.shape), list(b.shape)) == ([12, WIDTH], [3 * WIDTH, 12])
        blocks = b.view(3, WIDTH, 3, 4).abs().amax((1, 3))
        assert torch.equal(blocks > 0, torch.eye(3, dtype=torch.bool))
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    exact = reference(attention().state_dict(), tensors, config)
    keeper.model.eval()
    same(keeper.model(x.float()).detach().double(), exact(x).detach())
    loaded = PeftModel.from_pretrained(attention(), tmp_path).eval()
    wrong = reference(attention().state_dict(), tensors, config, twice=True)
    with torch.no_grad():
        found = loaded(x.float()).double()
    same(found, (wrong if adapted else exact)(x).detach())


def test_attention_comes_back_as_it_was(tmp_path):
    keeper = KeepLora(attention(), SMALL)
    learn(keeper, task(1), close=False)
    with pytest.warns(UserWarning, match="out_proj twice"):
        keeper.export_peft(tmp_path)
    again = KeepLora(attention(), SMALL)
    again.import_peft(tmp_path)
    same(logits(again.model), logits(keeper.model))
    assert {slot.name: slot.adapter.rank for slot in again.slots} == {
        "attn.q_proj": 2, "attn.k_proj": 2, "attn.v_proj": 2, "attn.out_proj": 6, "head": 2,
    }  # fmt: skip
    assert again.after_task(task(1), loss_fn).leak <= 1e-6


def test_rows_that_are_no_target_are_not_dropped(tmp_path):
    keeper = KeepLora(attention(), KeepLoraConfig(**{**SMALL.to_dict(), "target_modules": ["q_proj", "k_proj"]}))
    learn(keeper, task(1), close=False)
    keeper.export_peft(tmp_path)
    narrow = KeepLora(attention(), KeepLoraConfig(**{**SMALL.to_dict(), "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match=r"got rows of attn"):
        narrow.import_peft(tmp_path)


def test_open_clip_towers_come_back(tmp_path):
    def model():
        torch.manual_seed(0)
        vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
        return open_clip.model.CLIP(
            16, vision, {"context_length": 7, "vocab_size": 30, "width": 24, "layers": 1, "heads": 2}
        )

    def loss(model, batch):
        image, text = model.encode_image(batch[0], normalize=True), model.encode_text(batch[1], normalize=True)
        return nn.functional.cross_entropy(10 * image @ text.T, torch.arange(len(image)))

    batch = (torch.randn(5, 3, 16, 16), torch.randint(1, 29, (5, 7)))
    config = KeepLoraConfig(r=2, alpha=4, target_modules=["attn", "mlp"], weight_energy=0.3, feature_energy=0.5)
    keeper = KeepLora(model(), config)
    learn(keeper, [batch], loss)
    with pytest.warns(UserWarning, match="out_proj twice"):
        keeper.export_peft(tmp_path)
    again = KeepLora(model(), config)
    again.import_peft(tmp_path)
    same(loss(again.model.eval(), batch), loss(keeper.model.eval(), batch))
    mlp = KeepLora(model(), KeepLoraConfig(**{**config.to_dict(), "target_modules": ["mlp"]}))
    learn(mlp, [batch], loss)
    mlp.export_peft(tmp_path / "mlp")
    same(loss(PeftModel.from_pretrained(model(), tmp_path / "mlp").eval(), batch), loss(mlp.model.eval(), batch))


# ------------------------------------------------------------------ import


def test_export_and_import_are_inverse_and_training_goes_on(tmp_path):
    keeper = KeepLora(net(), CONFIG)
    learn(keeper, task(1), close=False)
    keeper.export_peft(tmp_path)
    again = KeepLora(net(), CONFIG)
    again.import_peft(tmp_path)
    assert torch.equal(logits(again.model), logits(keeper.model))
    assert [p.shape for p in again.trainable_parameters()] == [p.shape for p in keeper.trainable_parameters()]
    assert again.after_task(task(1), loss_fn).to_dict() == keeper.after_task(task(1)).to_dict()


def trained_stock(folder, **changes):
    model = stock(**changes)
    train(model, task(1))
    model.save_pretrained(folder)
    return model


def test_a_stock_adapter_reaches_into_what_is_protected_and_can_be_projected(tmp_path):
    model = trained_stock(tmp_path)
    keeper = KeepLora(net(), CONFIG)
    with pytest.raises(ValueError, match=r"import_peft: the adapter must keep out .* Pass project=True"):
        keeper.import_peft(tmp_path)
    assert not keeper.training_task
    assert all(slot.adapter is None for slot in keeper.slots)
    assert torch.equal(logits(keeper.model), logits(net()))
    keeper.import_peft(tmp_path, project=True)
    for slot in keeper.slots:
        found = adapter_layers(model)[f"base_model.model.{slot.name}"]
        q = keeper.basis(slot.name).double()
        update = found.scaling["default"] * (found.lora_B["default"].weight @ found.lora_A["default"].weight)
        wanted = update.double() - update.double() @ q @ q.T
        actual = slot.adapter.scaling * (slot.adapter.B @ slot.adapter.A)
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=1e-6)
    assert keeper.after_task(task(1), loss_fn).leak <= 1e-6


def test_nothing_protected_takes_a_stock_adapter_whole(tmp_path):
    model = trained_stock(tmp_path, rank_pattern={"blocks.1.up": 2}, alpha_pattern={"down": 3})
    keeper = KeepLora(net(), KeepLoraConfig(**{**CONFIG.to_dict(), "weight_energy": 0.0}))
    keeper.import_peft(tmp_path)
    same(logits(keeper.model), logits(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora must be False"),
        ({"bias": "lora_only"}, "a trained bias moves every output"),
        ({"init_lora_weights": "pissa"}, "must leave the base weights unchanged, got 'pissa'"),
        ({"init_lora_weights": "olora"}, "must leave the base weights unchanged, got 'olora'"),
        ({"modules_to_save": ["head"]}, r"modules_to_save=\['head'\]"),
        ({"target_modules": ["up", "head"]}, r"must cover the checkpoint's layers, got 1 .*\(first: head\)"),
    ],
    ids=str,
)
def test_what_cannot_be_represented_is_refused(tmp_path, changes, message):
    trained_stock(tmp_path, **changes)
    keeper = KeepLora(net(), KeepLoraConfig(**{**CONFIG.to_dict(), "weight_energy": 0.0}))
    with pytest.raises(ValueError, match=message):
        keeper.import_peft(tmp_path)
    assert not keeper.training_task


def test_files_that_are_not_there_or_do_not_fit(tmp_path):
    keeper = KeepLora(net(), CONFIG)
    with pytest.raises(StateError, match=r"adapter_config\.json must exist"):
        keeper.import_peft(tmp_path)
    with pytest.raises(ValueError, match=r"there must .*got none"):
        keeper.export_peft(tmp_path)
    assert not list(tmp_path.iterdir())
    narrow = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(3, 3)})])})
    other = get_peft_model(narrow, lora(r=2, target_modules=["up"], init_lora_weights=False))
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must fit the model's, got 3 x 3 for \[48, 24\] \[blocks\.0\.up\]"):
        keeper.import_peft(tmp_path)
    keeper.before_task(task(1), loss_fn)
    with pytest.raises(RuntimeError, match="import_peft: the open task must"):
        keeper.import_peft(tmp_path)


def test_the_stock_models_sum_of_tasks(tmp_path):
    """SubspaceState.export_peft: what update_subspace merged, as one stock adapter of the pretrained model."""
    model, state = stock(), None
    for seed in (1, 2):
        state = keeplora.initialize(model, task(seed), loss_fn, state)
        train(model, task(seed))
        keeplora.update_subspace(model, task(seed), state)
    state.export_peft(tmp_path, model)
    same(logits(PeftModel.from_pretrained(net(), tmp_path)), logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(net(), lora()).load_adapter(tmp_path, "again")


# Two tasks of the net, the second one open, as exported on 2026-11-29 before the lifecycle was one (146a812).
FIXTURE = Path(__file__).parent / "peft_adapter"


def test_an_adapter_of_an_earlier_day_loads_and_is_written_the_same_way(tmp_path):
    expected = load_file(FIXTURE / "expected.safetensors")["logits"]
    same(logits(PeftModel.from_pretrained(net(), FIXTURE)), expected)
    energies = {"weight_energy": 0.3, "feature_energy": 0.5}
    config = KeepLoraConfig(r=2, alpha=4, target_modules=["up", "down"], balance=False, **energies)  # as it was then
    keeper = KeepLora(net(), config)
    learn(keeper, task(1))
    learn(keeper, task(2), close=False)
    keeper.export_peft(tmp_path)
    written, then = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, FIXTURE))
    for version in (written, then):
        del version["peft_version"]  # PEFT's own
    assert {key: written[key] for key in then} == then
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, FIXTURE))
    assert {key: (value.shape, value.dtype) for key, value in mine.items()} == {
        key: (value.shape, value.dtype) for key, value in theirs.items()
    }
    ours = logits(PeftModel.from_pretrained(net(), tmp_path))  # trained anew: other CPUs sum in another order
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


def test_an_adapter_of_an_earlier_day_becomes_an_open_task(tmp_path):
    keeper = KeepLora(net(), KeepLoraConfig(r=4, alpha=8, target_modules=["up", "down"], weight_energy=0.0))
    keeper.import_peft(FIXTURE)
    same(logits(keeper.model), load_file(FIXTURE / "expected.safetensors")["logits"])
    assert keeper.after_task(task(1), loss_fn).leak <= 1e-6


def test_a_model_that_holds_adapters_of_peft_is_refused_and_its_merged_base_is_not():
    model = get_peft_model(net(), lora())
    for held in (model, model.get_base_model()):
        with pytest.raises(TypeError, match=r"must not hold adapters of PEFT, got Linear at .*up.*keeplora.initialize"):
            KeepLora(held, CONFIG)
    KeepLora(model.merge_and_unload(), CONFIG)
