"""What would lose retention silently is refused, or repaired: each case was once a wrong result without an error."""

import copy

import pytest
import torch
from close import assert_rounded
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from keeplora import KeepLora, KeepLoraConfig
from keeplora.lora import LoraAdapter, Target, attention_targets, linear_targets, unwrap, wrap
from keeplora.statistics import mean_gradients

WHOLE = Target("0", "0", "weight", None, 0, "model")


def loss_fn(model, batch):
    return model(batch).square().mean()


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("layer", [Scaled(4, 4), weight_norm(nn.Linear(4, 4))], ids=["subclass", "parametrized"])
def test_layers_of_their_own_kind_are_refused(layer):
    model = nn.Sequential(layer)
    with pytest.raises(TypeError, match=r"must name plain nn\.Linear or nn\.MultiheadAttention"):
        wrap(model, [WHOLE])
    assert model[0] is layer


def test_a_weight_shared_with_a_layer_that_is_no_target_is_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match=r"shared by embed\.weight and head\.weight"):
        wrap(model, linear_targets(model))


def test_an_encoder_layer_must_leave_its_fast_path():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    with pytest.raises(RuntimeError, match=r"set_fastpath_enabled\(False\)"):
        wrap(model, linear_targets(model))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        slots = wrap(model, linear_targets(model))
        for slot in slots:
            out, width = slot.weight.shape
            slot.attach(LoraAdapter(torch.randn(2, width), torch.randn(out, 2), 1.0))
        x = torch.randn(3, 5, 8)
        with torch.no_grad():
            torch.testing.assert_close(model.train()(x), model.eval()(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_weight_that_is_read_without_a_call_is_found_before_training():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(x, self.fc.weight)

    model = Reader()
    slots = wrap(model, linear_targets(model))
    with pytest.raises(RuntimeError, match=r"read without a call \[fc\]"):
        mean_gradients(model, slots, [torch.randn(3, 4)], loss_fn)


def test_hooks_added_later_are_not_dropped():
    model = nn.Sequential(nn.Linear(4, 4))
    wrap(model, [WHOLE])
    handle = model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="unwrap: layers must"):
        unwrap(model)
    handle.remove()
    unwrap(model)


@pytest.mark.parametrize("target", [("query", "in_proj_weight", (0, 4)), ("q_proj", "in_proj_weight", None)])
def test_attention_takes_its_own_slots_only(target):
    name, parameter, rows = target
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(ValueError, match="slots must be among"):
        wrap(model, [Target(f"0.{name}", "0", parameter, rows, 0, "model")])
    assert type(model[0]) is nn.MultiheadAttention
    assert len(wrap(model, attention_targets("0", model[0], 0, "model"))) == 4


def merge_random(slot, size=1e-2):
    out, width = slot.weight.shape
    adapter = LoraAdapter(torch.randn(2, width), size * torch.randn(out, 2), 1.0)
    slot.attach(adapter)
    slot.merge()
    return adapter.B.detach().double() @ adapter.A.detach().double()


def test_an_exact_weight_is_dropped_when_the_layer_is_given_another():
    model = nn.Sequential(nn.Linear(8, 6, dtype=torch.bfloat16))
    [slot] = wrap(model, [WHOLE])
    merge_random(slot)
    loaded = torch.randn(6, 8).bfloat16()
    model.load_state_dict({"0.weight": loaded, "0.bias": torch.zeros(6)})
    assert_rounded(slot.exact_weight, loaded.double() + 0, terms=1, what="loaded weight")
    merge_random(slot)
    model.float()
    before = slot.weight.double()
    update = merge_random(slot)
    exact = before + update
    merge_random(slot, size=0.0)  # a task that learns nothing must not undo the one before it
    assert_rounded(slot.weight.detach(), exact, terms=16, what="weight after float()")


def task():
    return [torch.randn(6, 8) for _ in range(3)]


def keeper_of(model):
    return KeepLora(model, KeepLoraConfig(r=2, alpha=2.0, target_modules="all-linear", feature_energy=0.5))


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def test_the_callers_autocast_does_not_reach_the_mathematics():
    start, data = net(), task()
    certificates = []
    for enabled in (False, True):
        torch.manual_seed(1)
        keeper = keeper_of(copy.deepcopy(start))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            keeper.before_task(data, loss_fn)
            for parameter in keeper.trainable_parameters():
                parameter.data.normal_()
            certificates.append(keeper.after_task(data))
    assert all(c.leak <= 1e-6 and c.leak_after_rounding <= 1e-5 and c.orthogonality <= 5e-6 for c in certificates)


def test_matrix_products_in_lower_precision_are_switched_off_and_on_again():
    data, keeper = task(), keeper_of(net())
    torch.set_float32_matmul_precision("medium")
    try:
        keeper.before_task(data, loss_fn)
        assert keeper.after_task(data).leak <= 1e-6
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_adapters_driven_to_nan_are_not_merged():
    data, keeper = task(), keeper_of(net())
    keeper.before_task(data, loss_fn)
    with torch.no_grad():
        keeper.trainable_parameters()[-1][0, 0] = float("nan")
    before = {k: v.clone() for k, v in keeper.state().tensors.items()}
    with pytest.raises(ValueError, match=r"after_task: trained parameters must be finite, got NaN or Inf \[2\]"):
        keeper.after_task(data)
    after = keeper.state().tensors
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)
    assert keeper.training_task


def test_a_model_made_half_during_a_task_keeps_its_adapters_exact():
    data, keeper = task(), keeper_of(net())
    keeper.before_task(data, loss_fn)
    keeper.model.bfloat16()
    assert all(p.dtype == torch.float32 for p in keeper.trainable_parameters())
    with torch.no_grad():
        for parameter in keeper.trainable_parameters():
            parameter.normal_()
    assert keeper.after_task([x.bfloat16() for x in data]).leak <= 1e-6


def test_float64_models_measure_what_the_weight_did():
    keeper, data = keeper_of(net().double()), [x.double() for x in task()]
    keeper.before_task(data, loss_fn)
    with torch.no_grad():
        for parameter in keeper.trainable_parameters():
            parameter.normal_()
    assert 0 < keeper.after_task(data).leak_after_rounding < 1e-12
