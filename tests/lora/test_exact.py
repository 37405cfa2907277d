"""Exact weights after many merges: from the pretrained weight and the updates, bit for bit as a sum in float32."""

import copy
import logging

import pytest
import torch
from torch import nn

from keeplora.lora import LoraAdapter, linear_targets, wrap
from keeplora.lora.slot import merge_adapters
from keeplora.ops import merge_weights

OUT, WIDTH, RANK, TASKS = 96, 80, 2, 8
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def slot_of(dtype, on_device=False, out=OUT, width=WIDTH):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out, bias=False)).to(dtype)
    [slot] = wrap(model, linear_targets(model))
    slot.exact.on_device = on_device
    return slot


def updates(dtype, out=OUT, width=WIDTH, rank=RANK, tasks=TASKS):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    draw = torch.Generator().manual_seed(1)
    for task in range(tasks):
        a, b = (torch.randn(*shape, generator=draw, dtype=wide) for shape in ((rank, width), (out, rank)))
        yield a, b * 0.01, 0.3 + 0.1 * task


def learn(slot, parts):
    for a, b, scaling in parts:
        slot.attach(LoraAdapter(a, b, scaling))
        slot.merge()


def reference(start, parts):
    """In float64, in one sum."""
    return start.double() + sum(c * b.double() @ a.double() for a, b, c in parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_tasks_give_the_bits_of_a_sum_in_float32(dtype):
    slot, beside = slot_of(dtype), slot_of(dtype, on_device=True)
    start, parts = slot.weight.detach().clone(), [*updates(dtype)]
    master = start.to(slot.exact_dtype)
    for part in parts:
        a, b, scaling = part
        [master] = merge_weights([master], [a], [b], scale=scaling)
        learn(slot, [part])
        learn(beside, [part])
        assert torch.equal(slot.exact_weight, master)
        assert torch.equal(beside.exact_weight, master)
        assert torch.equal(slot.weight, master.to(dtype))
        assert torch.equal(beside.weight, slot.weight)
    exact = reference(start, parts)
    error = (slot.exact_weight.detach().double() - exact).abs()
    most = TASKS * torch.finfo(master.dtype).eps * exact.abs().max()
    assert float(error.max()) <= float(most)
    away = slot.weight != exact.to(dtype)  # rounded to another neighbour: only from within that error of the middle
    halfway = (exact - (slot.weight.detach().double() + exact.to(dtype).double()) / 2).abs()
    assert bool((halfway[away] <= most).all())
    assert int(away.sum()) <= (0.01 * away.numel() if dtype in (torch.bfloat16, torch.float16) else away.numel())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_of_it_is_beside_the_weight(dtype):
    slot = slot_of(dtype)
    assert slot.exact.start is None  # before the first merge nothing is kept
    start = slot.weight.detach().clone()
    learn(slot, updates(dtype))
    assert slot.exact.master is None
    assert len(slot.learned) == TASKS
    if dtype in (torch.float32, torch.float64):
        assert slot.exact.start is None  # the weight is the sum
    else:
        assert torch.equal(slot.exact.start, start)
        assert slot.exact.start.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_is_smaller_than_its_updates_takes_their_place(dtype, caplog):
    """Σr passes in·out/(in + out) = 12 in the third task of rank 5."""
    out, width, rank = 30, 20, 5
    slot = slot_of(dtype, out=out, width=width)
    start, parts = slot.weight.detach().clone(), [*updates(dtype, out, width, rank)]
    learn(slot, parts[:2])
    assert (slot.exact.total, len(slot.exact.learned)) == (None, 2)
    with caplog.at_level(logging.INFO, "keeplora"):
        learn(slot, parts[2:])
    assert len([record for record in caplog.records if "1 layers keep the sum" in record.getMessage()]) == 1
    assert slot.exact.learned == []
    exact = reference(start, parts)
    torch.testing.assert_close(slot.exact_weight.double(), exact, rtol=0, atol=TASKS * 2e-7 * float(exact.abs().max()))
    assert torch.equal(slot.weight, slot.exact_weight.to(dtype))
    [update] = slot.learned
    torch.testing.assert_close(update.b.double() @ update.a.double(), exact - start.double(), rtol=1e-5, atol=1e-6)


def test_what_somebody_else_writes_counts_and_is_no_longer_known():
    slot, other = slot_of(torch.bfloat16), torch.randn(OUT, WIDTH).bfloat16()
    parts = [*updates(torch.bfloat16)]
    learn(slot, parts[:2])
    with torch.no_grad():
        slot.weight.copy_(other)
    assert torch.equal(slot.exact_weight, other.float())
    learn(slot, parts[2:3])
    assert not slot.exact.follows
    torch.testing.assert_close(slot.exact_weight.double(), reference(other, parts[2:3]), rtol=1e-6, atol=1e-6)


def test_what_is_forgotten_keeps_its_value():
    slot = slot_of(torch.bfloat16)
    learn(slot, updates(torch.bfloat16))
    exact = slot.exact_weight.clone()
    slot.forget()
    assert slot.learned is None
    assert torch.equal(slot.exact_weight, exact)
    learn(slot, [*updates(torch.bfloat16)][:1])
    assert slot.learned is None


def test_a_copy_of_the_model_goes_its_own_way():
    slot = slot_of(torch.bfloat16)
    parts = [*updates(torch.bfloat16)]
    learn(slot, parts[:1])
    twin = copy.deepcopy(slot.host).places()["weight"]
    learn(twin, parts[1:])
    learn(slot, parts[1:])
    assert torch.equal(twin.exact_weight, slot.exact_weight)


def test_many_are_merged_as_each_alone():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).bfloat16()
    slots = wrap(model, linear_targets(model))
    alone = copy.deepcopy(model)
    others = [module.places()["weight"] for module in alone]
    for group in (slots, others):
        for slot in group:
            out, width = slot.weight.shape
            [(a, b, c)] = updates(torch.bfloat16, out, width, 1, 1)
            slot.attach(LoraAdapter(a, b, c))
    merge_adapters(slots)
    for slot in others:
        slot.merge()
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(slots, others, strict=True))
