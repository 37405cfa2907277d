"""Two tasks on layers of a 7B model's shapes, with peak memory and time of every phase: python -m bench.seven

LLaVA-1.5-7B's Llama (hidden 4096, 11008 inside, 32 heads) with fewer blocks and a vocabulary of 1024 words, in
bfloat16. Weights are random, with the falling spectra of ``bench.shapes_7b``. r 16, all linear layers, weight_energy
0.6. Each task goes through ``before_task``, AdamW, ``after_task`` and ``save``; at the end ``load`` brings the state
into a fresh model.

Peak memory is the most resident memory of a phase, by the system's count, less what the process had before the model
was made. Beside it stands ``keeplora plan``'s formula for the same shapes, with the sizes of bases that were found.
"""

import argparse
import ctypes
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.memory import _now, _peak
from bench.run import machine
from bench.shapes_7b import matrix
from keeplora import KeepLora, KeepLoraConfig
from keeplora.methods import progress as bars
from keeplora.plan.activations import kept_by_block
from keeplora.plan.memory import Setting, footprint, memory, parts
from keeplora.plan.shapes import Shapes, shapes_of_model

RANK, WORDS, TOKENS, BATCHES = 16, 1024, 128, 4
FILE = Path(__file__).parent / "results" / "cpu" / "seven.json"


def config(blocks: int, hidden: int, inner: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=WORDS, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128,
    )  # fmt: skip


def model(blocks: int, hidden: int, inner: int) -> nn.Module:
    """Weight by weight in bfloat16: nothing is ever there in float32 but the one at hand."""
    from transformers import LlamaForCausalLM

    made: nn.Module = LlamaForCausalLM._from_config(config(blocks, hidden, inner), dtype=torch.bfloat16)
    for seed, parameter in enumerate(made.parameters()):
        if parameter.ndim == 2:
            drawn = matrix(*parameter.shape, 0.35, seed)
            parameter.data.copy_(drawn / torch.linalg.vector_norm(drawn) * min(parameter.shape) ** 0.5)
    return made


def task(number: int, tokens: int = TOKENS) -> list[Tensor]:
    draw = torch.Generator().manual_seed(number)
    return [torch.randint(WORDS, (1, tokens), generator=draw) for _ in range(BATCHES)]


def loss_fn(net: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = net(input_ids=ids, labels=ids).loss
    return loss


class Watch:
    """Seconds and peak of every phase, and of the parts that have a progress bar."""

    def __init__(self) -> None:
        _give_back()
        self.base = _now()
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        parts: list[dict[str, Any]] = []
        bar = bars._bar

        def watched(phase: str, *arguments: Any) -> Any:
            return _Part(bar(phase, *arguments), phase, parts, self)

        bars._bar = watched
        start = time.process_time()
        self.reset()
        self.most = 0.0
        try:
            yield
        finally:
            bars._bar = bar
        seconds, peak = time.process_time() - start, max(self.most, self.peak())
        _give_back()
        row = {"phase": name, "seconds": round(seconds, 2), "peak": round(peak), "after": round(_now() - self.base)}
        self.rows.append({**row, "parts": parts})
        print(row, flush=True)
        for part in parts:
            print("   ", part, flush=True)

    def peak(self) -> float:
        """Since the last reset."""
        return _peak() - self.base

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")


def _give_back() -> None:
    """What is freed, to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class _Part:
    """A progress bar that writes down when it began and ended, and the most memory in between."""

    def __init__(self, bar: Any, name: str, parts: list[dict[str, Any]], watch: Watch):
        self.bar, self.name, self.parts, self.watch = bar, name, parts, watch

    def __enter__(self) -> Any:
        self.watch.most = max(self.watch.most, self.watch.peak())
        self.watch.reset()
        self.start = time.process_time()
        return self.bar.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)
        peak = self.watch.peak()
        self.watch.most = max(self.watch.most, peak)
        self.parts.append(
            {"part": self.name, "seconds": round(time.process_time() - self.start, 2), "peak": round(peak)}
        )


def warm_up() -> None:
    """What libraries take when they are first used belongs to no phase."""
    with tempfile.TemporaryDirectory() as folder:
        small = KeepLora(model(1, 128, 128), KeepLoraConfig(r=2, target_modules="all-linear"), progress=False)
        small.before_task(task(0, 16), loss_fn)
        optimizer = torch.optim.AdamW(small.trainable_parameters())
        loss_fn(small.model, task(0, 16)[0]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        small.after_task(task(0, 16))
        small.save(folder)


def sizes(keeper: KeepLora) -> dict[str, tuple[int, int]]:
    """k of every basis: of the weight, and of tasks."""
    counts = ((room.name, room.protected, sum(room.added_by_task)) for room in keeper.capacity())
    return {name: (protected - added, added) for name, protected, added in counts}


def formula(shapes: Shapes, setting: Setting, activations: int, after: dict[str, tuple[int, int]]) -> dict[str, float]:
    """MiB of main memory at the peak of every phase: it stands for the device's, too.

    Bases grow before pretrained weights are copied, so that ``after_task`` has two moments.
    """
    moments = {moment.name: moment for moment in memory(shapes, setting, activations)}
    told = {name: moment.total + sum(moment.host.values()) for name, moment in moments.items()}
    grown, tasks = footprint(shapes, replace(setting, ranks=after)), setting.tasks
    adapters = moments["training"].device["adapters"] + moments["training"].device["optimizer"]
    held = moments["wrapped"].total + adapters + grown.bases(tasks)
    moment_sizes = parts(shapes, setting)["moments"]
    extending = (
        held + grown.starts(tasks) + grown.updates(tasks) + grown.closing(moment_sizes, setting.budget, whole=False)
    )
    merging = held + grown.starts(1) + grown.updates(tasks + 1) + max(x.merge_work() for x in grown.layers)
    told |= {
        "after_task": max(extending, merging),
        "between tasks": held - adapters + grown.host(tasks + 1) - grown.bases(tasks),
    }
    return {name: round(size / 2**20) for name, size in told.items()}


def run(blocks: int, tasks: int, hidden: int, inner: int, budget: int, tokens: int) -> dict[str, Any]:
    warm_up()
    watch, folder = Watch(), Path(tempfile.mkdtemp())
    with watch.phase("model"):
        net = model(blocks, hidden, inner)
    settings = KeepLoraConfig(r=RANK, target_modules="all-linear", weight_energy=0.6, memory_budget=budget)
    with watch.phase("wrapped"):
        keeper = KeepLora(net, settings, progress=False)
    shapes = shapes_of_model("seven", net, keeper.targets, net.config)
    kept = blocks * kept_by_block(net.config, torch.bfloat16, RANK, "keeplora", tokens)
    learned = []
    for number in range(tasks):
        data = task(number, tokens)
        with watch.phase("before_task"):
            keeper.before_task(data, loss_fn)
        before = sizes(keeper)
        optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=1e-3)
        with watch.phase("training"):
            for ids in data[:2]:
                loss_fn(net, ids).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        with watch.phase("after_task"):
            certificate = keeper.after_task(data)
        del optimizer
        print(certificate, flush=True)
        with watch.phase("save"):
            keeper.save(folder)
        disk = round(sum(file.stat().st_size for file in folder.glob("tensors-*")) / 2**20)
        setting = Setting(RANK, tasks=number, budget=budget, ranks=before, length=tokens)
        told = formula(shapes, setting, kept, sizes(keeper))
        learned.append({"formula, MiB": told, "disk, MiB": disk, "directions": sizes(keeper)})
        print(learned[-1], flush=True)
    del keeper, net
    with watch.phase("a fresh model"):
        net = model(blocks, hidden, inner)
    with watch.phase("load"):
        KeepLora.load(folder, net)
    shutil.rmtree(folder)
    adapted = sum(matrix.numel for matrix in shapes.adapted)
    return {"adapted parameters": adapted, "phases": watch.rows, "tasks": learned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--budget", type=int, default=2**30, help="memory_budget, bytes")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--file", type=Path, default=FILE)
    a = parser.parse_args()
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: larger tensors go back to the system when freed
    result = run(a.layers, a.tasks, a.hidden, a.inner, a.budget, a.tokens)
    facts = {**machine(torch.device("cpu")), "command": " ".join(["python -m bench.seven", *sys.argv[1:]])}
    a.file.parent.mkdir(parents=True, exist_ok=True)
    a.file.write_text(json.dumps({"machine": facts, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
