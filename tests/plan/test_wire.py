"""What goes over the wire in a task switch, counted beside the formula with 1, 2 and 4 processes."""

import datetime
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from keeplora import KeepLora, KeepLoraConfig
from keeplora.lora import linear_targets
from keeplora.plan import Setting, wire_bytes
from keeplora.plan.shapes import shapes_of_model
from keeplora.plan.wire import ring_bytes
from tests.processes import SETTINGS, batch, found_by, loss_fn, start

CHOICES = {"exact": {}, "sketch": {"r": 1, "gradient_statistic": "sketch"}, "balance": {"balance": True}}


def counting(sent):
    """Let every collective say what it sends: tensors that are summed, and objects."""
    add, gather = dist.all_reduce, dist.all_gather_object

    def all_reduce(tensor, **options):
        sent["tensors"] += tensor.numel() * tensor.element_size()
        return add(tensor, **options)

    def all_gather_object(replies, value, **options):
        sent["objects"] += len(pickle.dumps(value))
        sent["gathers"] += 1
        dist.all_reduce = add  # objects are gathered by collectives of tensors
        result = gather(replies, value, **options)
        dist.all_reduce = all_reduce
        return result

    dist.all_reduce, dist.all_gather_object = all_reduce, all_gather_object


def switch(share, **settings):
    sent, found = {"tensors": 0, "objects": 0, "gathers": 0}, {}
    counting(sent)
    keeper = KeepLora(start(), KeepLoraConfig(**SETTINGS | settings))
    keeper.before_task(share, loss_fn)
    found["before_task"] = dict(sent)
    sent.update(tensors=0, objects=0, gathers=0)
    keeper.after_task(share)
    found["after_task"] = dict(sent)
    return found


def work(rank, folder, count):
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=datetime.timedelta(seconds=60))
    torch.save(switches(rank), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def switches(rank):
    original = dist.all_reduce, dist.all_gather_object
    found = {}
    for name, settings in CHOICES.items():
        found[name] = switch([batch(rank, "a first")], **settings)
        dist.all_reduce, dist.all_gather_object = original
    return found


@pytest.mark.parametrize("count", [1, 2, 4])
def test_bytes_on_the_wire_are_those_of_the_formula(tmp_path, count):
    found = [switches(0)] if count == 1 else found_by(tmp_path, work, count, count)
    model = start()
    shapes = shapes_of_model("branches", model, linear_targets(model))
    for name, settings in CHOICES.items():
        budget = 0 if name == "sketch" else None
        setting = Setting(rank=settings.get("r", SETTINGS["r"]), budget=budget)
        expected = wire_bytes(shapes, setting, balance=name == "balance")
        expected["after_task"] -= 4 * 12 * 12  # layers a and b read one tensor, which no name tells
        for phase, counts in ((phase, counts) for rank in found for phase, counts in rank[name].items()):
            assert counts["tensors"] == (expected[phase] if count > 1 else 0), (name, phase)
            assert counts["gathers"] <= 12
            assert counts["objects"] <= 2048 * len(shapes.adapted)


def test_nothing_grows_with_the_number_of_processes():
    assert [ring_bytes(1 << 20, n) for n in (1, 2, 4)] == [0, 1 << 20, 3 << 19]
    assert ring_bytes(1 << 20, 10**6) < 2 << 20
