"""What a PeftModel may not have if its training is to be confined: refused with a sentence, nothing changed."""

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from stock_peft import CONFIG, WIDTH, logits, lora, loss_fn, net, stock, task
from torch import nn

import keeplora
from keeplora.lora import Target


def initialize(model, **options):
    return keeplora.initialize(model, task(1, batches=1), loss_fn, config=options.pop("config", CONFIG), **options)


def trained_head():
    model = stock()
    model.base_model.model.head.weight.requires_grad_(True)
    return model


def two_active():
    model = stock()
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    return model


def merged():
    model = stock()
    model.merge_adapter()
    return model


def disabled():
    model = stock()
    model.base_model.disable_adapter_layers()
    return model


def half():
    return get_peft_model(net().bfloat16(), lora(), autocast_adapter_dtype=False)


def tied():
    model = net()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return get_peft_model(model, lora())


def kept():
    model = net()
    keeplora.KeepLora(model, keeplora.KeepLoraConfig(r=2, target_modules=["up"]))
    return get_peft_model(model, lora(target_modules=["up"]))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def own_forward():
    model = net()
    model.blocks[0].up = Scaled(WIDTH, 2 * WIDTH)
    return get_peft_model(model, lora())


def attention():
    return get_peft_model(nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, 2)}), LoraConfig(target_modules=["attn"]))


def embedding():
    return get_peft_model(nn.ModuleDict({"embed": nn.Embedding(7, WIDTH)}), LoraConfig(target_modules=["embed"]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (net, TypeError, r"must be a PeftModel, got Net\. .*keeplora\.KeepLora"),
        (lambda: get_peft_model(net(), LoHaConfig(target_modules=["up"])), ValueError, "the adapter must be LoRA"),
        (lambda: stock(use_dora=True), ValueError, "use_dora must be False.*DoRA rescales"),
        (lambda: stock(init_lora_weights="pissa"), ValueError, "leave the base weights unchanged, got 'pissa'"),
        (lambda: stock(init_lora_weights="olora"), ValueError, "leave the base weights unchanged, got 'olora'"),
        (lambda: stock(init_lora_weights=False), RuntimeError, r"must be fresh \(B zero\), got 4 layers"),
        (lambda: stock(bias="all"), ValueError, "a trained bias moves every output"),
        (lambda: stock(lora_bias=True), ValueError, "lora_bias False, got 'none' and True"),
        (lambda: stock(target_parameters=["head.weight"]), ValueError, r"target_parameters must be None"),
        (
            lambda: stock(modules_to_save=["head"]),
            ValueError,
            r"got 2 .* beside it .*modules_to_save=\['head'\]",
        ),
        (trained_head, ValueError, r"got 1 parameters beside it \(first: base_model\.model\.head\.weight\)"),
        (two_active, RuntimeError, "one adapter must be active, got default, other"),
        (merged, RuntimeError, r"neither merged nor disabled, got default merged.*unmerge_adapter"),
        (disabled, RuntimeError, "neither merged nor disabled, got them disabled"),
        (half, TypeError, r"adapters must be float32, got torch\.bfloat16"),
        (tied, ValueError, r"must belong to one layer, got one that is shared \(tied\) \[blocks\.0\.up\]"),
        (kept, RuntimeError, "must not be held by a keeper already"),
        (own_forward, TypeError, "must compute x Wᵀ \\+ b, got .*Scaled with a forward of its own at blocks.0.up"),
        (
            attention,
            TypeError,
            "must not be PEFT's MultiheadAttention, got one at attn: it applies",
        ),
        (embedding, TypeError, "adapted layers must be nn.Linear, got Embedding at embed"),
    ],
)
def test_refusals(make, error, message):
    model = make()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(error, match=message):
        initialize(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 7}, r"config\.r must be left alone, got 7: the adapter's LoraConfig says 4"),
        ({"alpha": 3.0}, r"config\.alpha must be left alone"),
        ({"dropout": 0.3}, r"config\.dropout must be left alone"),
        ({"target_modules": ["up"]}, r"config\.target_modules must be \('attn',\) with PEFT's layers"),
        ({"train_a": True}, r"config\.train_a must be False .* else keeplora\.KeepLora"),
        ({"init_b": "gradient"}, r"config\.init_b must be 'zero'"),
        ({"depth_scale": {"vision": 0.2}}, "depth_scale must name towers of the model"),
    ],
    ids=str,
)
def test_settings_that_stock_layers_do_not_have(config, message):
    with pytest.raises(ValueError, match=message):
        initialize(stock(), config=keeplora.KeepLoraConfig(**config))


def test_the_same_setting_twice_is_fine():
    initialize(stock(), config=keeplora.KeepLoraConfig(r=4, alpha=8, depth_scale=1.0))


def test_a_new_head_may_be_trained_when_it_is_named():
    model = stock(modules_to_save=["head"])
    state = initialize(model, also_train=["head"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_B" not in name}
    assert trained == {f"base_model.model.head.modules_to_save.default.{part}" for part in ("weight", "bias")}
    keeplora.update_subspace(model, task(1), state)


def test_depth_and_tower_can_be_given():
    targets = [
        Target(f"blocks.{i}.{leaf}", f"blocks.{i}.{leaf}", "weight", None, i, "language")
        for i in range(2)
        for leaf in ("up", "down")
    ]
    model = stock()
    initialize(model, targets=targets)
    alphas = [model.get_submodule(f"base_model.model.{t.module}").lora_alpha["default"] for t in targets]
    assert alphas == pytest.approx([1.6, 1.6, 8, 8])
    with pytest.raises(ValueError, match=r"got 2 others \(first: blocks\.1\.up\)"):
        initialize(stock(), targets=targets[:2])


def test_a_layer_that_is_read_without_a_call_is_found():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

        def forward(self, x):
            return self.head(x @ self.up.weight.T)

    with pytest.raises(RuntimeError, match=r"weight is read without a call \[up\]"):
        initialize(get_peft_model(Reader(), LoraConfig(r=2, target_modules=["up", "head"])))


def test_passes_call_peft_layers_as_they_are():
    """Features and gradients are those of the model with its earlier adapters, dropout off, whatever its mode."""
    model = stock(lora_dropout=0.5)
    model.train()
    seen = []
    state = initialize(model)
    assert model.training
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = logits(model)
    model.train()

    def remember(model, batch):
        seen.append(model(torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(9))))
        return loss_fn(model, batch)

    keeplora.update_subspace(model, task(1, batches=1), state, loss_fn=remember)
    assert torch.equal(seen[0], expected)
