"""What PEFT's own tests ask of a LoRA adapter, asked of keeplora's exports and of models it initialised.

Merging and taking back, switching, disabling, several adapters, other dtypes and ways to load: restated in small,
because PEFT's tests are not in its wheel (docs/peft.md says which of them were run and how).
"""

import copy
import pickle

import pytest
import torch
from peft import PeftModel
from stock_peft import CONFIG, WIDTH, adapter_layers, logits, lora, loss_fn, net, stock, task, train

import keeplora
from keeplora import KeepLora, KeepLoraConfig

SETTINGS = KeepLoraConfig(r=4, alpha=8, target_modules=["up", "down"], weight_energy=0.3, feature_energy=0.8)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def exported(folder, seed, open_task=False):
    keeper = KeepLora(net(), SETTINGS)
    keeper.before_task(task(seed), loss_fn)
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=2e-2)
    for batch in task(seed):
        optimizer.zero_grad()
        loss_fn(keeper.model, batch).backward()
        optimizer.step()
    if not open_task:
        keeper.after_task(task(seed))
    keeper.export_peft(folder)
    return logits(keeper.model)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {seed: (folder / str(seed), exported(folder / str(seed), seed, open_task=seed == 2)) for seed in (1, 2)}


def initialised():
    model = stock()
    state = keeplora.initialize(model, task(1), loss_fn, config=CONFIG)
    train(model, task(1))
    return model, state


def test_merge_and_unmerge(adapters):
    folder, learned = adapters[1]
    model = PeftModel.from_pretrained(net(), folder)
    model.merge_adapter()
    same(logits(model), learned)
    model.unmerge_adapter()
    same(logits(model), learned)
    same(logits(copy.deepcopy(model).merge_and_unload(safe_merge=True)), learned)
    assert torch.equal(logits(PeftModel.from_pretrained(net(), folder).unload()), logits(net()))


def test_safe_merge_sees_a_broken_adapter(adapters):
    model = PeftModel.from_pretrained(net(), adapters[1][0])
    next(iter(adapter_layers(model).values())).lora_A["default"].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


def test_disabling_gives_the_pretrained_function(adapters):
    folder, learned = adapters[1]
    model = PeftModel.from_pretrained(net(), folder)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(net()))
    same(logits(model), learned)


def test_switching_adding_up_and_deleting(adapters):
    model = PeftModel.from_pretrained(net(), adapters[1][0], "one")
    model.load_adapter(adapters[2][0], "two")
    same(logits(model), adapters[1][1])
    model.set_adapter("two")
    same(logits(model), adapters[2][1])
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    same(logits(model), both)
    model.set_adapter("one")
    model.delete_adapter("sum")
    model.delete_adapter("two")
    same(logits(model), adapters[1][1])


def test_loaded_without_memory_for_a_copy_and_saved_again(adapters, tmp_path):
    folder, learned = adapters[1]
    model = PeftModel.from_pretrained(net(), folder, low_cpu_mem_usage=True)
    same(logits(model), learned)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(net(), tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_base(adapters, dtype):
    folder, learned = adapters[1]
    model = PeftModel.from_pretrained(net().to(dtype), folder).eval()
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        found = model(x.to(dtype)).float()
    # Five layers' roundings of half an eps each, of numbers no larger than the largest activation.
    assert (found - learned).abs().max() <= 5 * torch.finfo(dtype).eps * learned.abs().max()


def test_pefts_own_merging_of_an_initialised_adapter():
    model, _ = initialised()
    learned = logits(model)
    model.merge_adapter()
    same(logits(model), learned)
    with pytest.raises(RuntimeError, match="neither merged nor disabled"):
        keeplora.freeze_a(model)
    model.unmerge_adapter()
    same(logits(model.merge_and_unload(safe_merge=True)), learned)


def test_switching_away_and_back_needs_freeze_a():
    model, state = initialised()
    learned = logits(model)
    model.add_adapter("other", lora())
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(net()))
    model.set_adapter("default")
    assert torch.equal(logits(model), learned)
    keeplora.freeze_a(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_B.default" in name for name in trained)
    assert keeplora.update_subspace(model, task(1), state).leak <= 1e-6


def test_copies_and_pickles_hold_nothing_of_keeplora():
    model, state = initialised()
    assert not [m for m in model.modules() if type(m).__module__.startswith("keeplora")]
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), logits(model))
        assert keeplora.update_subspace(again, task(1), copy.deepcopy(state)).leak <= 1e-6


def test_a_base_in_half_precision_keeps_its_dtype_and_what_it_protects():
    model = stock(net().bfloat16())

    def half_loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0].bfloat16()).float(), batch[1])

    state = keeplora.initialize(model, task(1), half_loss, config=CONFIG)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    half_loss(model, task(1)[0]).backward()
    optimizer.step()
    certificate = keeplora.update_subspace(model, task(1), state)
    assert certificate.leak <= 1e-6 < certificate.leak_after_rounding
    layer = adapter_layers(model)["base_model.model.blocks.0.up"]
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert layer.lora_A["default"].weight.dtype == torch.float32
    master = state.masters["blocks.0.up"]
    assert torch.equal(master.bfloat16(), layer.base_layer.weight)
