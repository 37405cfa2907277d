"""What two processes of one group do in the tests of keeplora.distributed; each writes what it found to a file."""

import contextlib
import copy
import datetime
import multiprocessing
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from keeplora import KeepLora, KeepLoraConfig
from keeplora.distributed import processes
from keeplora.lora import linear_targets, wrap
from keeplora.statistics import feature_statistics, mean_gradients

# Imported once, in a process that those of all tests are forked from
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "transformers.trainer", "keeplora"]
)

WIDTH, CLASSES = 12, 5
SETTINGS = {"r": 3, "target_modules": "all-linear", "weight_energy": 0.4, "feature_energy": 0.7}


class Branches(nn.Module):
    """Two layers of one shape, called in the order that the batch says, on one input or on two."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, batch):
        x, how = batch["x"], batch["how"]
        if how == "b first":
            second, first = self.b(x), self.a(x)
        elif how == "b first, apart":
            second, first = self.b(1.0 * x), self.a(x)
        elif how == "a alone":
            return self.head(self.a(x).tanh())
        elif how == "apart":
            first, second = self.a(x), self.b(1.0 * x)
        else:
            first, second = self.a(x), self.b(x)
        return self.head(first.tanh() + 0.5 * second.relu())


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch), batch["y"])


def start():
    torch.manual_seed(0)
    return Branches()


def batch(seed, how, size=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, WIDTH, generator=generator) * torch.arange(1, WIDTH + 1) ** -1.0
    return {"x": x, "y": torch.randint(CLASSES, (size,), generator=generator), "how": how}


def shares(name):
    """The batches of both processes."""
    every = [batch(i, how) for i, how in enumerate(("a first", "b first, apart", "b first", "apart", "apart"))]
    return {
        "uneven": (every[:1] + every[4:], every[1:4]),  # the second meets the layers in another order
        "one idle": (every, []),
        "idle first": ([], every),
        "one input": (every[:1], every[2:3]),
        "short batches": ([batch(6, "a first", 3), every[0]], [batch(7, "apart", 11), batch(8, "a first", 2)]),
        "b on one alone": ([batch(5, "a alone")], every[1:4]),
    }[name]


def statistics(share, peers):
    """Every kind of statistic of a pass."""
    model = start()
    slots = wrap(model, linear_targets(model))
    frames = [torch.linalg.qr(torch.randn(WIDTH, 4, generator=torch.Generator().manual_seed(9))).Q] * 3
    found = {}
    for kind, keep in (("exact", None), ("sketch", [4, 4, None]), ("images", frames)):
        found[kind] = mean_gradients(model, slots, share, loss_fn, keep=keep, peers=peers)
    for kind in ("second_moment", "slot_mean", "sketch"):
        parts = feature_statistics(model, slots, share, loss_fn, kind=kind, sketch_share=0.5, peers=peers)
        found[f"features, {kind}"] = [getattr(p.moment, "factor", p.moment) for p in parts]
        found[f"counts, {kind}"] = [(p.tokens, p.energy) for p in parts]
        found[f"shared, {kind}"] = parts[0] is parts[1]
    return found


def task(share, group=None, **settings):
    """Bases, adapters and the certificate of a task; its training is the same everywhere, as under DDP."""
    keeper = KeepLora(start(), KeepLoraConfig(**SETTINGS | settings))
    keeper.before_task(share, loss_fn, group=group)
    adapters = [slot.adapter.A.detach().clone() for slot in keeper.slots]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in keeper.trainable_parameters():
            parameter.normal_(std=0.1, generator=generator)
    certificate = keeper.after_task(share)
    bases = [keeper.basis(slot.name) for slot in keeper.slots]
    return {"adapters": adapters, "bases": bases, "certificate": certificate.to_dict()}


def error_of(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def snapshot(keeper):
    state = keeper.state()
    return state.meta, state.tensors, [p.requires_grad for p in keeper.model.parameters()]


def unchanged(before, after):
    return (
        before[0] == after[0]
        and before[2] == after[2]
        and all(torch.equal(before[1][k], after[1][k]) for k in before[1])
    )


def failures(rank, share):
    """A process fails on its own: what both raise, and that both can go on afterwards."""
    broken = copy.deepcopy(share)
    broken[1]["x"][0, 0] = float("nan")

    def stops():
        yield share[0]
        raise OSError("the disk is gone")

    keeper, found = KeepLora(start(), KeepLoraConfig(**SETTINGS)), {}

    def fails(name, call):
        before = snapshot(keeper)
        found[name] = (*error_of(call), unchanged(before, snapshot(keeper)))

    fails("nan loss on 1", lambda: keeper.before_task(broken if rank == 1 else share, loss_fn))
    fails("loader breaks on 0", lambda: keeper.before_task(stops() if rank == 0 else share, loss_fn))
    fails("no batch at all", lambda: keeper.before_task([], loss_fn))
    fails("no loss function on 1", lambda: keeper.before_task(share, None if rank == 1 else loss_fn))
    weight = keeper.slots[0].weight
    if rank == 1:
        weight.data[0, 0] += 1
    fails("other weights", lambda: keeper.before_task(share, loss_fn))
    if rank == 1:
        weight.data.copy_(start().a.weight)
    keeper.before_task(share, loss_fn)  # still in step
    fails("nan feature on 1", lambda: keeper.after_task(broken if rank == 1 else share))
    if rank == 0:
        keeper.trainable_parameters()[0].data[0, 0] = float("inf")
    fails("adapter broken on 0", lambda: keeper.after_task(share))
    if rank == 0:
        keeper.trainable_parameters()[0].data[0, 0] = 0.0
        keeper.trainable_parameters()[1].data[0, 0] = 0.5
    fails("adapters apart", lambda: keeper.after_task(share))
    if rank == 0:
        keeper.trainable_parameters()[1].data[0, 0] = 0.0
    keeper.after_task(share)
    return found


def others(rank, share):
    """Models or settings that differ between processes."""
    model = start()
    slots = wrap(model, linear_targets(model))
    some = slots if rank == 0 else slots[:2]
    chosen = KeepLora(start(), KeepLoraConfig(**SETTINGS | {"r": 1}, memory_budget=0 if rank else 1 << 30))
    chosen.before_task(share, loss_fn)
    return {
        "layers": error_of(lambda: mean_gradients(model, some, share, loss_fn, peers=processes())),
        "kinds": error_of(lambda: feature_statistics(
            model, slots, share, loss_fn, kind="second_moment" if rank else "sketch", peers=processes()
        )),
        "a budget of nothing on 1": [slot.adapter.A.detach().clone() for slot in chosen.slots],
    }  # fmt: skip


@contextlib.contextmanager
def joined(rank, folder, count):
    """One of ``count`` processes, with one thread."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=datetime.timedelta(seconds=60))
    yield
    dist.destroy_process_group()


def found_by(folder, function, count, *more):
    """What each of some processes found."""
    context = mp.start_processes(
        function, args=(str(folder), *more), nprocs=count, join=False, start_method="forkserver"
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 560
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "a process is waiting for another that will not come"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def task_of_a_group(rank, folder):
    """Ranks 0 and 2 of three share a task; rank 1 learns another one at the same time, alone."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=datetime.timedelta(seconds=60))
    pair, alone = dist.new_group([0, 2]), dist.new_group([1])
    data = shares("uneven")
    group, share = (alone, data[0][:1]) if rank == 1 else (pair, data[rank // 2])
    found = {"task": task(share, group=group), "peers": (processes(group).rank, processes(group).size)}
    if rank == 1:
        found["stranger"] = error_of(lambda: processes(pair))
    else:  # an error reaches the group, and nobody else
        keeper = KeepLora(start(), KeepLoraConfig(**SETTINGS))
        found["error"] = error_of(lambda: keeper.before_task(share, loss_fn if rank else None, group=group))
        found["kept"] = keeper.group is None
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def work(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    found = {"statistics": {}, "tasks": {}}
    for name in ("uneven", "one idle", "idle first", "one input", "short batches"):
        found["statistics"][name] = statistics(shares(name)[rank], processes())
    for name, settings in (("exact", {}), ("sketch", {"gradient_statistic": "sketch", "r": 1})):
        found["tasks"][name] = task(shares("uneven")[rank], **settings)
    found["tasks"]["b on one alone"] = task(shares("b on one alone")[rank])  # a warning would be an error
    found["failures"] = failures(rank, shares("uneven")[rank])
    found["others"] = others(rank, shares("uneven")[rank])
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
