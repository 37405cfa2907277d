"""A process that is stopped while others wait for it: they end too, at once, with an error that says so."""

import datetime
import multiprocessing
import os
import signal
import time

import pytest
import torch.distributed as dist

from keeplora import KeepLora, KeepLoraConfig
from keeplora.distributed import PeerError, processes
from tests.processes import SETTINGS, batch, loss_fn, start

FORK = multiprocessing.get_context("fork")
SOON = 2.0


def stopped_at(kind, after):
    """A loss function that its process does not come back from."""
    calls = []

    def loss(model, data):
        calls.append(data)
        if len(calls) == after:
            os.kill(os.getpid(), kind)
            time.sleep(0.1)
        return loss_fn(model, data)

    return loss


def work(rank, folder, kind, when, stay, told):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    share = [batch(i, "a first") for i in range(3)]
    keeper = KeepLora(start(), KeepLoraConfig(**SETTINGS))
    own = stopped_at(kind, 2) if rank == 0 else loss_fn
    began = time.monotonic()
    try:
        if when == "before_task":
            keeper.before_task(share, own)
        else:
            keeper.before_task(share, loss_fn)
            keeper.after_task(share, own)
    except BaseException as error:
        told.put((rank, type(error).__name__, str(error), keeper.training_task, time.monotonic() - began))
        if rank == 0:
            time.sleep(stay)  # as a notebook does
        raise SystemExit(3) from error


@pytest.mark.parametrize("when", ["before_task", "after_task"])
@pytest.mark.parametrize(
    ("kind", "stay"),
    [(signal.SIGINT, 0), (signal.SIGINT, 4), (signal.SIGTERM, 0), (signal.SIGKILL, 0)],
    ids=["Ctrl-C", "Ctrl-C in a notebook", "SIGTERM", "SIGKILL"],
)
def test_when_one_process_is_stopped_the_other_ends(tmp_path, kind, stay, when):
    told = FORK.Queue()
    group = [FORK.Process(target=work, args=(rank, tmp_path, kind, when, stay, told)) for rank in range(2)]
    for process in group:
        process.start()
    try:
        heard = {}
        while 1 not in heard:
            rank, *rest = told.get(timeout=30)
            heard[rank] = rest
        name, text, open_task, _ = heard[1]
        assert name == "PeerError"
        assert "KeyboardInterrupt" in text or "has ended" in text
        assert open_task == (when == "after_task")
        if stay:
            assert group[0].is_alive()
        group[1].join(SOON)
        assert group[1].exitcode == 3
    finally:
        for process in group:
            process.kill()
            process.join()


def test_who_is_torn_out_of_an_exchange_says_nothing_more(monkeypatch):
    """It is out of step: another exchange would meet the others in the middle of theirs."""
    calls = []

    def torn(replies, value, group=None):
        calls.append(value)
        raise KeyboardInterrupt

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "all_gather_object", torn)
    with pytest.raises(KeyboardInterrupt), processes().together():
        processes().gather(1)
    assert len(calls) == 1


def test_an_exchange_without_an_answer_is_a_peer_error(monkeypatch):
    def gone(*_, **__):
        raise RuntimeError("Connection closed by peer\nand more")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "all_gather_object", gone)
    monkeypatch.setattr(dist, "all_reduce", gone)
    for exchange in (lambda: processes().gather(1), lambda: processes().add(None)):
        with pytest.raises(PeerError, match=r"Connection closed by peer$"):
            exchange()
