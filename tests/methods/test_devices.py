"""A model over several devices: whatever belongs to a layer lies where its weight does, and no call mixes devices.

The second device is torch's meta device, which has shapes and no numbers: a product of tensors on both is an error.
"""

import sys

import pytest
import torch
from torch import nn

from keeplora.lora import LoraAdapter, ProjectedAdamW, exact, linear_targets, merge_adapters, merge_ahead, wrap
from keeplora.lora import slot as slot_module
from keeplora.methods.progress import for_all_layers
from keeplora.statistics import budget, gradients

DEVICES = ["meta", "cpu", "meta", "cpu"]


@pytest.fixture
def slots():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8).requires_grad_(False) for _ in DEVICES))
    made = wrap(model, linear_targets(model))
    for layer, device in zip(model, DEVICES, strict=True):
        layer.to(device)  # after wrapping, which refuses weights without numbers
    return made


def adapted(slots):
    for slot in slots:
        slot.attach(LoraAdapter(torch.eye(8)[:2], torch.zeros(8, 2), 1.0))
    return slots


def devices(tensors):
    return [tensor.device.type for tensor in tensors]


def test_layers_are_worked_on_by_device(slots):
    groups = []

    def compute(group):
        groups.append([slots[i].weight.device.type for i in group])
        return [slots[i].weight @ slots[i].weight.T for i in group]

    products = for_all_layers(slots, compute, "layers", shown=False)
    assert devices(products) == DEVICES
    assert all(len(set(group)) == 1 for group in groups)


def test_statistics_adapters_and_the_optimizers_state(slots):
    statistics = gradients._Gradients(slots, [None, None, 2, 2], seed=0)
    assert devices(statistics.sums.values()) == DEVICES
    adapters = [slot.adapter for slot in adapted(slots)]
    assert devices(adapter.A for adapter in adapters) == devices(adapter.B for adapter in adapters) == DEVICES
    factors = [adapter.B for adapter in adapters]
    for factor in factors:
        factor.grad = torch.zeros_like(factor)
    optimizer = ProjectedAdamW(factors, bases={}, lr=1e-3)
    optimizer.step()
    for factor in factors:
        assert optimizer.state[factor]["exp_avg"].device == factor.device
        assert optimizer.state[factor]["exp_avg_sq"].device == factor.device


def test_merging_in_a_forward_and_at_the_end(slots, monkeypatch):
    for module in ("forward", "merge_ahead"):  # autocast knows no meta device
        monkeypatch.setattr(sys.modules[f"keeplora.lora.{module}"], "compute_dtype", lambda tensor: tensor.dtype)
    model = nn.ModuleList([slot.host for slot in adapted(slots)])
    for slot in slots:
        slot.host.forward_mode = "merged"
    begin, end = merge_ahead(model)
    hooks = model._forward_pre_hooks[begin.id].__self__
    for _ in range(2):  # a first forward teaches which weights are merged in one
        hooks.begin(model, None)
        formed = [slot.host.merged_ahead["weight"].merged.weight for slot in slots if slot.host.merged_ahead]
        assert devices(formed) == DEVICES[: len(formed)]
        outputs = [slot.host(torch.ones(3, 8, device=slot.weight.device, requires_grad=True)) for slot in slots]
        ahead = [bool(slot.host.to_merge) for slot in slots]
        hooks.end(model, None, None)
        assert devices(outputs) == DEVICES
    assert len(formed) == len(DEVICES)
    assert not any(ahead)
    begin.remove(), end.remove()
    monkeypatch.setattr(exact, "hash_of", lambda weight: "")  # what was learned is kept in main memory
    for module in (exact, slot_module):
        monkeypatch.setattr(module, "to_host", lambda tensor: tensor)
    merge_adapters(slots)
    assert devices(slot.weight for slot in slots) == DEVICES


def test_what_statistics_may_take_is_what_the_fullest_device_has(slots, monkeypatch):
    free = {"cpu": 300, "meta": 100}
    monkeypatch.setattr(budget, "free_bytes", lambda device: free[device.type])
    assert budget.budget_of(None, slots) == 40  # a fifth; half of the weights are where 100 are free
    assert budget.budget_of(None, slots[1:2]) == 60
