"""Processes that are killed while they save: afterwards the old state is there or the new one, and all goes on."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import keeplora
from keeplora._files import LOCK, write_json
from keeplora.lora import peft_checkpoint
from keeplora.lora.update import Update
from keeplora.methods.method import Method
from keeplora.train.config import parse_config
from keeplora.train.loop import run_one
from keeplora.train.record import RESULT_FILE, RunRecord, load_progress

from .children import SAVED, at_every_operation, die, end, kill, start
from .subjects import Batch, learned, loss_fn, pretrained, same, task, unsound
from .trials import Tries


def lost(folder: Path, allowed: Sequence[Method]) -> str | None:
    """What is wrong with the state in ``folder``, which must be one of the allowed."""
    try:
        method = keeplora.load(folder, pretrained())
    except Exception as error:
        return f"cannot be loaded: {type(error).__name__}: {error}"
    if not any(same(method.state(), other.state()) for other in allowed):
        return "is none of the states that were saved"
    return unsound(method) or None


def left(folder: Path) -> str | None:
    """What killed processes have left after another save."""
    names = [path.name for path in folder.rglob(".*") if path.name != LOCK]
    return f"{names[0]} was left" if names else None


def at_random(folder: Path, numbers: random.Random) -> Tries:
    """A process saves two states in turn until it is killed."""
    methods = [learned(tasks=1), learned(tasks=2)]
    methods[0].save(folder)

    def save() -> None:
        while True:
            for method in reversed(methods):
                method.save(folder)

    while True:
        process = start(save)
        time.sleep(numbers.uniform(0, 0.2))
        kill(process)
        loss = lost(folder, methods)
        if loss is None:
            methods[0].save(folder)
            loss = left(folder)
        yield loss


@dataclasses.dataclass(frozen=True)
class Saving:
    """Something that is saved: by ``first`` and then, interrupted, by ``second``.

    ``wrong(folder, through)`` says what is wrong with what is there; ``through``: the second save says that it is.
    """

    first: Callable[[Path], Any]
    second: Callable[[Path], Any]
    wrong: Callable[[Path, bool], str | None]


def savings() -> list[Saving]:
    """All that the package saves."""
    old, new = learned(tasks=1), learned(tasks=2)
    layers = [{"0": Update(torch.full((r, 8), 1.0), torch.full((8, r), 1.0), 1.0)} for r in (1, 2)]

    def adapter(rank: int) -> Callable[[Path], None]:
        return lambda folder: peft_checkpoint.write(folder, pretrained(), layers[rank - 1])

    def wrong_adapter(folder: Path, through: bool) -> str | None:
        try:
            read = peft_checkpoint.read(folder)
        except ValueError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            return "is gone" if through else None  # neither the old nor the new one, and it says so
        config = json.loads((folder / "adapter_config.json").read_text())
        ranks = [2] if through else [1, 2]
        return None if config["r"] == read["0"].rank and config["r"] in ranks else "is a mix, or the old adapter"

    def wrong_json(folder: Path, through: bool) -> str | None:
        value = json.loads((folder / "value.json").read_text())
        return None if value in [[2] * 1000, *([] if through else [[1] * 1000])] else "is a mix, or the old file"

    def wrong_state(folder: Path, through: bool) -> str | None:
        return lost(folder, [new] if through else [old, new])

    def wrong_new_state(folder: Path, through: bool) -> str | None:
        return lost(folder, [new]) if through or (folder / "state.json").exists() else None

    return [
        Saving(old.save, new.save, wrong_state),
        Saving(lambda folder: shutil.rmtree(folder, ignore_errors=True), new.save, wrong_new_state),
        Saving(adapter(1), adapter(2), wrong_adapter),
        Saving(
            lambda folder: write_json(folder / "value.json", [1] * 1000),
            lambda folder: write_json(folder / "value.json", [2] * 1000),
            wrong_json,
        ),
    ]


def at_every_write(folder: Path, numbers: random.Random) -> Tries:
    """Every kind of save is killed at its first operation on files, its second, …"""
    for number, saving in enumerate(savings()):
        place = folder / str(number)
        saving.first(place)
        for _ in at_every_operation(place, lambda: saving.second(place), die):  # noqa: B023 (runs at once)
            loss = saving.wrong(place, False)
            saving.second(place)
            yield loss or saving.wrong(place, True) or left(place)
            saving.first(place)


class Work:
    """A benchmark of three small tasks."""

    tasks = ("a", "b", "c")
    witness = None

    def fingerprint(self) -> str:
        return "reliability"

    def model(self) -> nn.Module:
        return pretrained()

    def batches(self, task_number: int, batch_size: int, seed: int) -> list[Batch]:
        batches = task(task_number)
        random.Random(seed).shuffle(batches)
        return batches

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return loss_fn(model, batch)

    def accuracy(self, model: nn.Module, task_number: int | None, split: str, batch_size: int) -> float:
        inputs, labels = task(task_number or 0)[0]
        return float((model(inputs).argmax(1) == labels).double().mean())


CONFIG = parse_config(
    {
        "benchmark": "reliability", "methods": ["keeplora"], "epochs": 2, "tensorboard": False, "precision": "fp32",
        "method": {"keeplora": {"r": 2, "target_modules": "all-linear", "feature_energy": 0.5}},
    }
)  # fmt: skip
_TIMED = ("train_seconds", "switch_seconds", "evaluate_seconds", "inference_seconds", "peak_bytes")


def _figures(record: RunRecord) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(record).items() if name not in _TIMED}


def runs(folder: Path, numbers: random.Random) -> Tries:
    """Runs are killed and resumed until they are through; their figures are those of a run that nobody disturbed."""
    started = time.monotonic()
    whole = _figures(run_one(CONFIG, Work(), "keeplora", 0))
    duration = time.monotonic() - started
    identity = CONFIG.identity("keeplora", 0)
    for number in range(1_000_000):
        place, before, through = folder / str(number), 0, False
        while not through:
            process = start(lambda: run_one(CONFIG, Work(), "keeplora", 0, folder=place))  # noqa: B023 (runs at once)
            time.sleep(numbers.uniform(0, duration))
            if not (place / RESULT_FILE).exists():
                kill(process)
            through = (place / RESULT_FILE).exists() or numbers.random() < 0.1
            if through:  # it has a result, or may work to its end now
                code = end(start(lambda: run_one(CONFIG, Work(), "keeplora", 0, folder=place)))  # noqa: B023
                kill(process)
                if code != SAVED:
                    yield f"a run could not be resumed (exit code {code})"
                    break
                record = run_one(CONFIG, Work(), "keeplora", 0, folder=place)
                yield None if _figures(record) == whole else "a resumed run has other figures"
                break
            progress = load_progress(place, identity)
            tasks = 0 if progress is None else progress[0].finished_tasks
            yield None if tasks >= before else f"{before} tasks were learned, {tasks} are left"
            before = tasks
