"""Two processes on one task: what one would find, one state in one folder, and no process that waits for a dead one."""

from __future__ import annotations

import os
import random
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import keeplora
from keeplora.methods import KeepLora

from .children import HUNG, SAVED, end, start
from .kills import left
from .subjects import fresh, loss_fn, pretrained, task
from .trials import Tries

RANKS = 2
SOON = 2.0
"""Seconds within which the others must have ended."""


def _grouped(rank: int, meeting: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )


def _train(method: KeepLora, share: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    method.before_task(share, loss_fn)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.trainable_parameters():  # the same everywhere, as under DistributedDataParallel
            parameter.normal_(std=0.1, generator=draw)
    method.after_task(share, loss_fn)


def _different(folder: Path, alone: KeepLora) -> str | None:
    try:
        method = keeplora.load(folder, pretrained())
    except Exception as error:
        return f"cannot be loaded: {type(error).__name__}: {error}"
    assert isinstance(method, KeepLora)
    for slot in alone.slots:
        bases = [keeper.basis(slot.name).double() for keeper in (alone, method)]
        if bases[0].shape != bases[1].shape or (bases[0] @ bases[0].T - bases[1] @ bases[1].T).abs().max() > 1e-3:
            return f"two processes protect another subspace than one [{slot.name}]"
    return None


def against_one(folder: Path, numbers: random.Random) -> Tries:
    """Both ranks learn their shares and save into one folder, at one time."""
    batches = task(0, 4)
    alone = fresh()
    assert isinstance(alone, KeepLora)
    _train(alone, batches)
    folder.mkdir(exist_ok=True)
    for number in range(1_000_000):
        place, meeting = folder / f"state-{number}", folder / f"meeting-{number}"

        def work(rank: int, place: Path = place, meeting: Path = meeting) -> None:
            _grouped(rank, meeting)
            method = fresh()
            assert isinstance(method, KeepLora)
            _train(method, batches[rank::RANKS])
            dist.barrier()
            method.save(place)
            dist.barrier()

        codes = [end(process) for process in [start(lambda r=r: work(r)) for r in range(RANKS)]]  # type: ignore[misc]
        yield (None if codes == [SAVED] * RANKS else f"exit codes {codes}") or _different(place, alone) or left(place)


def _again(process: int) -> None:
    """Ctrl-C once more, if the first one did nothing: Python drops one that comes in a destructor, as tqdm has."""
    time.sleep(SOON / 4)
    if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        os.kill(process, signal.SIGINT)


def one_ends(folder: Path, numbers: random.Random) -> Tries:
    """One rank is stopped in the middle of its work: the others end soon, with an error."""
    folder.mkdir(exist_ok=True)
    for number in range(1_000_000):
        meeting = folder / f"meeting-{number}"
        begun = folder / f"begun-{number}"

        def work(rank: int, meeting: Path = meeting, begun: Path = begun) -> None:
            for stopping in (signal.SIGINT, signal.SIGTERM):
                signal.signal(stopping, signal.default_int_handler if stopping == signal.SIGINT else signal.SIG_DFL)
            _grouped(rank, meeting)
            while True:
                _train(fresh(), task(0)[rank::RANKS])  # type: ignore[arg-type]
                begun.with_name(f"{begun.name}-{rank}").touch()

        processes = [start(lambda r=r: work(r)) for r in range(RANKS)]  # type: ignore[misc]
        deadline = time.monotonic() + 60
        while len(list(folder.glob(f"{begun.name}-*"))) < RANKS and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(numbers.uniform(0, 0.2))
        victim = numbers.randrange(RANKS)
        kind = numbers.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        os.kill(processes[victim], kind)
        stopped = time.monotonic()
        if kind == signal.SIGINT:
            _again(processes[victim])
        codes = [end(process, SOON * 5) for process in processes]
        seconds = time.monotonic() - stopped
        if HUNG in codes:
            yield f"a process went on after {kind.name} to another"
        elif SAVED in codes:
            yield f"a process ended without an error after {kind.name} to another"
        else:
            yield None if seconds < SOON else f"{seconds:.1f} s passed after {kind.name} to one process"
