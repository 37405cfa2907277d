"""A process that fails or is stopped in a training step: the launcher ends all at once, and says of what."""

import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import tests.processes  # noqa: F401 (what processes are forked from)
from keeplora import KeepLora, KeepLoraConfig

COUNT, WIDTH, SOON = 4, 12, 5.0
DATA = [torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(4)]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.broken = nn.Linear(WIDTH, WIDTH), ""

    def forward(self, x):
        y = self.layer(x)
        if self.broken == "in":
            raise ValueError("the layer is broken")
        if self.broken == "backward":
            y.register_hook(_broken)
        return x + y.tanh()


def _broken(_):
    raise ValueError("the gradient is broken")


def work(folder, how):
    """Trains, and its second process fails in its third step. The group would have others wait for two minutes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, store = int(os.environ["RANK"]), dist.FileStore(str(folder / "store"), COUNT)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=COUNT, timeout=datetime.timedelta(seconds=120)
    )  # fmt: skip
    model = nn.Sequential(Block(), Block()).requires_grad_(False)
    for module in (*model, model):
        fully_shard(module)
    keeper = KeepLora(model, KeepLoraConfig(r=2, target_modules="all-linear", weight_energy=0.2, balance=False))
    keeper.before_task(DATA, lambda model, x: model(x).square().mean())
    optimizer = keeper.optimizer(lr=1e-3)
    for step, x in enumerate(10 * DATA):
        if rank == 1 and step == 2:
            (folder / "when").write_text(str(time.time()))
            if how == "before":
                raise ValueError("the batch is broken")
            if how.startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[how])
            model[1].broken = how
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def ended_soon(folder):
    return time.time() - float((folder / "when").read_text()) < SOON


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("before", "ValueError: the batch is broken"),
        ("in", "ValueError: the layer is broken"),
        ("backward", "ValueError: the gradient is broken"),
    ],
)
def test_the_launcher_ends_all_and_says_of_what(tmp_path, how, cause):
    """torchrun's, which looks after its processes every tenth of a second."""
    logs = DefaultLogsSpecs(str(tmp_path / "logs"), redirects=Std.ALL)
    launched = LaunchConfig(
        1, 1, COUNT, logs_specs=logs, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        start_method="forkserver", run_id="steps",
    )  # fmt: skip
    with pytest.raises(ChildFailedError) as error:
        elastic_launch(launched, work)(tmp_path, how)
    assert ended_soon(tmp_path)
    own = [file.read_text() for file in (tmp_path / "logs").rglob("1/error.json")]
    assert cause in "".join([str(error.value), *own])  # others fail of a closed connection, maybe sooner


@pytest.mark.parametrize(
    ("how", "cause"), [("SIGINT", "KeyboardInterrupt"), ("SIGKILL", "Signal 9 (SIGKILL) received")]
)
def test_torchrun_ends_all_when_one_is_stopped(tmp_path, how, cause):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={COUNT}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "--module", "tests.test_shared_out_steps", str(tmp_path), how]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parents[1]
    )  # fmt: skip
    assert ended_soon(tmp_path)
    assert ran.returncode
    assert cause in ran.stderr


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    work(Path(sys.argv[1]), sys.argv[2])
