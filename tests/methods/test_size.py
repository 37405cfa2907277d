"""How large a task's update is beside the weights, and what is said of it: every method that merges, and PEFT."""

import re
import warnings

import pytest
import stock_peft
import torch

from keeplora import initialize, update_subspace
from keeplora.methods import METHODS
from keeplora.methods.lora_method import LoraMethod
from keeplora.methods.size import update_size
from tests.methods.contract import loss_fn, make, task

WHOLE = {"gpm": "trains whole weights", "osf": "as good as does"}
NAMES = sorted(
    name
    for name, method in METHODS.items()
    if isinstance(method.build, type) and issubclass(method.build, LoraMethod) and name not in WHOLE
)


def test_the_size_is_that_of_the_products():
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    updates = [[(normal(2, 5), normal(4, 2)), (normal(1, 5), normal(4, 1))], [], [(normal(0, 3), normal(3, 0))]]
    weights = [normal(4, 5), normal(2, 2).bfloat16(), normal(3, 3)]
    moved = sum(float((b.double() @ a.double()).square().sum()) for parts in updates for a, b in parts)
    held = sum(float(w.double().square().sum()) for w in weights)
    assert update_size(updates, weights) == pytest.approx((moved / held) ** 0.5, rel=1e-12)
    assert update_size([[]], [torch.zeros(2, 2)]) == 0


def said(caught):
    """The size in the warning, None without one."""
    sizes = [m for w in caught if (m := re.search(r"got ([\d.e+-]+) \(‖ΔW‖", str(w.message)))]
    assert len(sizes) <= 1
    return float(sizes[0][1]) if sizes else None


@pytest.mark.parametrize(("b", "told"), [(1e-6, True), (1e-2, False), (30.0, True), (0.0, False)])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_says_when_an_update_is_negligible_or_huge(name, b, told):
    torch.manual_seed(0)
    method = make(name)
    method.before_task(task(0), loss_fn)
    for slot in method.slots:
        if slot.adapter is not None:
            origin = 0 if slot.adapter.origin is None else slot.adapter.origin
            with torch.no_grad():
                (slot.adapter.B if slot.adapter.B.requires_grad else slot.adapter.A).normal_().mul_(b).add_(origin)
    before = [slot.weight.detach().double().clone() for slot in method.slots]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method.after_task(task(0))
    moved = sum(float((s.weight.double() - w).square().sum()) for s, w in zip(method.slots, before, strict=True))
    held = sum(float(slot.weight.double().square().sum()) for slot in method.slots)
    assert (said(caught) is not None) == told, [str(w.message) for w in caught]
    if told:
        assert said(caught) == pytest.approx((moved / held) ** 0.5, rel=0.06)  # as it is printed


@pytest.mark.parametrize(("b", "told"), [(1e-6, True), (1e-2, False), (30.0, True), (0.0, False)])
@pytest.mark.parametrize("merge", [True, False])
def test_with_peft_too(b, told, merge):
    model = stock_peft.stock()
    state = initialize(model, stock_peft.task(0), stock_peft.loss_fn, config=stock_peft.CONFIG)
    with torch.no_grad():
        for parameter in [p for name, p in model.named_parameters() if "lora_B" in name]:
            parameter.normal_().mul_(b)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        update_subspace(model, stock_peft.task(0), state, merge=merge)
    assert (said(caught) is not None) == told
