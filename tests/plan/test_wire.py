"""What goes over the wire in a task switch, counted beside the formula with 1, 2 and 4 processes."""

import datetime
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from keeplora import KeepLora, KeepLoraConfig
from keeplora.lora import linear_targets
from keeplora.plan import Setting, wire_bytes
from keeplora.plan.shapes import shapes_of_model
from keeplora.plan.wire import ring_bytes
from tests.processes import SETTINGS, batch, found_by, loss_fn, start

CHOICES = {
    "exact": {"balance": False},
    "sketch": {"r": 1, "gradient_statistic": "sketch", "balance": False},
    "balance": {},
}
ROWS = "rows"  # of a model that FSDP2 has cut up


def counting(sent):
    """Let every collective say what it sends: tensors that are summed, rows, bases, and objects."""
    add, gather = dist.all_reduce, dist.all_gather_object

    def counted(kind, collective):
        def call(tensor, *more, **options):
            sent[kind] += tensor.numel() * tensor.element_size()
            return collective(tensor, *more, **options)

        return call

    all_reduce = counted("tensors", add)
    dist.gather, dist.broadcast = counted("rows", dist.gather), counted("bases", dist.broadcast)

    def all_gather_object(replies, value, **options):
        sent["objects"] += len(pickle.dumps(value))
        sent["gathers"] += 1
        dist.all_reduce = add  # objects are gathered by collectives of tensors
        result = gather(replies, value, **options)
        dist.all_reduce = all_reduce
        return result

    dist.all_reduce, dist.all_gather_object = all_reduce, all_gather_object


def switch(share, model, **settings):
    sent, found = dict.fromkeys(("tensors", "rows", "bases", "objects", "gathers"), 0), {}
    counting(sent)
    keeper = KeepLora(model, KeepLoraConfig(**SETTINGS | settings))
    keeper.before_task(share, loss_fn)
    found["before_task"] = sent | {"k": [keeper.basis(slot.name).shape[1] for slot in keeper.slots]}
    sent.update(dict.fromkeys(sent, 0))
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
    names = ("all_reduce", "all_gather_object", "gather", "broadcast")
    original = {name: getattr(dist, name) for name in names}
    found = {}
    for name, settings in (CHOICES | ({ROWS: {}} if dist.is_initialized() else {})).items():
        model = start().requires_grad_(False)
        if name == ROWS:
            fully_shard(model)
        found[name] = switch([batch(rank, "a first")], model, **settings)
        for each in names:
            setattr(dist, each, original[each])
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
            assert counts["rows"] == counts["bases"] == 0
    for rank in found if count > 1 else ():
        expected = wire_bytes(shapes, Setting(rank=SETTINGS["r"]))
        before, after = rank[ROWS]["before_task"], rank[ROWS]["after_task"]
        assert before["tensors"] == expected["before_task"]
        assert before["rows"] == sum(4 * -(-m.rows // count) * m.width for m in shapes.adapted)
        assert before["bases"] == sum(4 * m.width * k for m, k in zip(shapes.adapted, before["k"], strict=True))
        # certificates, and hashes of the pretrained weights: one block each, rounded to three dtypes
        own = 16 * len(shapes.adapted) + (3 + 1) * 8 * len(shapes.adapted)
        assert after["tensors"] == expected["after_task"] - 4 * 12 * 12 + own
        assert after["rows"] == after["bases"] == 0


def test_nothing_grows_with_the_number_of_processes():
    assert [ring_bytes(1 << 20, n) for n in (1, 2, 4)] == [0, 1 << 20, 3 << 19]
    assert ring_bytes(1 << 20, 10**6) < 2 << 20
