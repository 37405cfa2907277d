"""A process that fails or is stopped while FSDP2 has others wait for it: all end at once, and say of what."""

import datetime
import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from keeplora import KeepLora, KeepLoraConfig
from tests.shared_out import SETTINGS, batches, loss_fn, sharded

FORK = multiprocessing.get_context("fork")
SOON = 5.0
COUNT = 4


class Broken(nn.Module):
    """Raises in the middle of a block's forward, or of its backward."""

    def __init__(self, inner, backward):
        super().__init__()
        self.inner, self.backward = inner, backward

    def forward(self, x):
        y = self.inner(x)
        if not self.backward:
            raise ValueError("the layer is broken")
        y.register_hook(_broken)
        return y


def _broken(_):
    raise ValueError("the gradient is broken")


def fails(how, model):
    """A loss function, of the second process, that fails in its second step."""
    calls = []

    def loss(model, batch):
        calls.append(batch)
        if len(calls) == 2:
            if how == "before":
                raise ValueError("the batch is broken")
            if how in ("in", "backward"):
                act = model.model.layers[1].mlp
                act.act_fn = Broken(act.act_fn, how == "backward")
            elif how == "exit":
                raise SystemExit(3)
            elif how != "after":
                os.kill(os.getpid(), how)
                time.sleep(0.1)
        value = loss_fn(model, batch)
        if len(calls) == 2 and how == "after":
            raise ValueError("the loss is broken")
        return value

    return loss


def work(rank, folder, how, stay):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.stderr = open(folder / f"{rank}.txt", "w")  # noqa: SIM115 (until the end)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), COUNT), rank=rank, world_size=COUNT,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    keeper = KeepLora(sharded(), KeepLoraConfig(**SETTINGS))
    own = fails(how, keeper.model) if rank == 1 else loss_fn
    try:
        keeper.before_task(batches(rank, 3, 0), own)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if rank == 1:
            time.sleep(stay)  # as a notebook does
        os._exit(3)


@pytest.mark.parametrize(
    ("how", "stay", "cause"),
    [
        ("before", 0, "ValueError: the batch is broken"),
        ("in", 60, "ValueError: the layer is broken"),
        ("backward", 0, "ValueError: the gradient is broken"),
        ("after", 60, "ValueError: the loss is broken"),
        ("exit", 0, "SystemExit: 3"),
        (signal.SIGINT, 60, "KeyboardInterrupt"),
        (signal.SIGKILL, 0, "another process must answer, but has ended"),
    ],
    ids=["before", "in, and stays", "backward", "after, and stays", "exit", "Ctrl-C, and stays", "killed"],
)
def test_all_end_and_say_of_what(tmp_path, how, stay, cause):
    def said(rank):
        file = tmp_path / f"{rank}.txt"
        return file.read_text() if file.exists() else ""

    group = [FORK.Process(target=work, args=(rank, tmp_path, how, stay)) for rank in range(COUNT)]
    for process in group:
        process.start()
    try:
        while group[1].is_alive() and (how == signal.SIGKILL or cause not in said(1)):
            time.sleep(0.05)
        began = time.monotonic()
        others = [rank for rank in range(COUNT) if rank != 1]
        for rank in others:
            group[rank].join(SOON)
            assert group[rank].exitcode in (1, 3), "a process waits for one that will not come"
        assert time.monotonic() - began < SOON
        assert group[1].is_alive() == bool(stay)
        for rank in others:
            assert cause in said(rank), said(rank)
            assert how == signal.SIGKILL or "process 1 of 4" in said(rank)
    finally:
        for process in group:
            process.kill()
            process.join()
