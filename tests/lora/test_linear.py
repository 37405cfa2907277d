import pytest
import torch
from close import assert_rounded
from torch import nn

from keeplora.lora import LoraAdapter, LoraLinear, Target, unwrap, wrap


def fused(out=12, width=10, ranges=((0, 4), (8, 12)), dtype=torch.float32):
    model = nn.Sequential(nn.Linear(width, out, dtype=dtype))
    targets = [Target(f"0.part{i}", "0", "weight", rows, 0, "model") for i, rows in enumerate(ranges)]
    return model, wrap(model, targets)


def exact(layer, x):
    weight = layer.weight.detach().double().clone()
    for slot, adapter in layer.adapters.items():
        rows = layer.slots[slot].rows or (0, weight.shape[0])
        b = adapter.B.detach().double() - (0 if adapter.origin is None else adapter.origin.double())
        weight[rows[0] : rows[1]] += adapter.scaling * b @ adapter.A.detach().double()
    return x.double() @ weight.T + layer.bias.detach().double()


@pytest.mark.parametrize("origin", [False, True])
@pytest.mark.parametrize("shape", [(10,), (3, 10), (2, 5, 10), (0, 10)], ids=str)
def test_row_ranges_match_float64_before_and_after_merge(shape, origin):
    model, slots = fused()
    for i, slot in enumerate(slots):
        b = torch.randn(4, 3)
        slot.attach(LoraAdapter(torch.randn(3, 10), b, 0.5 + i, origin=torch.randn(4, 3) if origin else None))
    x = torch.randn(shape)
    expected = exact(model[0], x)
    assert_rounded(model(x).detach(), expected, terms=3 * 10 * 10, what="y")
    for slot in slots:
        slot.merge()
    assert_rounded(model(x).detach(), expected, terms=3 * 10 * 10, what="merged y")


def test_zero_b_and_origin_leave_the_output_bitwise():
    model, slots = fused()
    x = torch.randn(5, 10)
    before = model(x)
    b = torch.randn(4, 3)
    slots[0].attach(LoraAdapter(torch.randn(3, 10), torch.zeros(4, 3), 2.0))
    slots[1].attach(LoraAdapter(torch.randn(3, 10), b, 2.0, origin=b))
    assert torch.equal(model(x), before)


def test_gradcheck():
    layer = LoraLinear(nn.Linear(5, 4, dtype=torch.float64))
    layer.add_slot("rows", "weight", (1, 3))
    a, b = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    layer.slots["rows"].attach(LoraAdapter(a, b, 0.3, train_a=True))
    adapter = layer.adapters["rows"]

    def run(x, a, b):
        return torch.func.functional_call(layer, {"slots.rows.adapter.A": a, "slots.rows.adapter.B": b}, (x,))

    inputs = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), adapter.A, adapter.B
    assert torch.autograd.gradcheck(run, inputs)


def test_merging_in_half_precision_does_not_pile_up_roundings():
    _, (slot, _) = fused(dtype=torch.bfloat16)
    start = slot.weight.detach().double().clone()
    total = torch.zeros(4, 10, dtype=torch.float64)
    for _ in range(50):  # each update is far below the weight's rounding step
        a, b = torch.randn(1, 10), torch.randn(4, 1) * 1e-4
        slot.attach(LoraAdapter(a, b, 1.0))
        slot.merge()
        total += b.double() @ a.double()
    exact_weight = start + total
    assert_rounded(slot.exact_weight, exact_weight, terms=50 * 50, what="exact weight")
    assert torch.equal(slot.weight, slot.exact_weight.bfloat16())


def test_takes_over_the_parameters_and_gives_them_back():
    base = nn.Linear(4, 3)
    model = nn.Sequential(base)
    keys = set(model.state_dict())
    [slot] = wrap(model, [Target("0", "0", "weight", None, 0, "model")])
    assert model[0].weight is base.weight
    assert set(model.state_dict()) == keys
    slot.attach(LoraAdapter(torch.zeros(1, 4), torch.zeros(3, 1), 1.0))
    with pytest.raises(RuntimeError, match=r"unwrap: adapters must .*got 1 attached"):
        unwrap(model)
    slot.detach()
    unwrap(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight is base.weight


def test_refuses():
    model, slots = fused()
    with pytest.raises(TypeError, match=r"base must be an nn.Linear, got ReLU"):
        LoraLinear(nn.ReLU())
    with pytest.raises(ValueError, match=r"weight of shape \[4, 10\], got A \[3, 9\] and B \[4, 3\]"):
        slots[0].attach(LoraAdapter(torch.zeros(3, 9), torch.zeros(4, 3), 1.0))
    slots[0].attach(LoraAdapter(torch.zeros(3, 10), torch.zeros(4, 3), 1.0))
    with pytest.raises(RuntimeError, match="already holds an adapter"):
        slots[0].attach(LoraAdapter(torch.zeros(3, 10), torch.zeros(4, 3), 1.0))
    with pytest.raises(ValueError, match=r"rows must .*got \(3, 6\)"):
        model[0].add_slot("more", "weight", (3, 6))
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 12\] with start < stop, got \(10, 13\)"):
        model[0].add_slot("more", "weight", (10, 13))
    with pytest.raises(ValueError, match=r"parameter must be a weight of LoraLinear, got 'wieght'"):
        model[0].add_slot("more", "wieght", None)
