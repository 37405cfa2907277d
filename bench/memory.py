"""Bytes per adapted parameter at every moment, beside PEFT's LoRA: python -m bench.memory [FILE] [TASKS] or --four-bit

Two Llama blocks in bfloat16 (hidden 1024, 2752 inside: 25.3 million adapted parameters), r 16, all linear layers,
weight_energy 0.6, AdamW. On a CPU the device's memory is main memory: what lies on the device is told by role. Counted
are the storages of all live tensors that the model did not have before; of these, what is kept in main memory where
there is a GPU (bases, pretrained weights, updates) is the host's, and the rest the device's. Measured are the peak of a
task switch, by torch's profiler, and of saving and loading, by the system's count of resident memory. --four-bit: the
same blocks quantised, and PEFT's QLoRA.
"""

import gc
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bench.harness import recorded_bytes
from bench.run import machine
from keeplora import KeepLora, KeepLoraConfig
from keeplora.math.digest import digest

HIDDEN, INNER, BLOCKS, RANK, TOKENS = 1024, 2752, 2, 16, 64
SETTINGS: dict[str, Any] = {"r": RANK, "target_modules": "all-linear", "weight_energy": 0.6}
BUDGETS = (2**27, 2**29, 2**30)
FILE = Path(__file__).parent / "results" / "cpu" / "memory.json"


def model(hidden: int = HIDDEN, inner: int = INNER, *, four_bit: bool = False) -> nn.Module:
    """In bfloat16; ``four_bit``: its blocks' linear layers in bitsandbytes' NF4 with doubly quantised scales."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=BLOCKS,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
    )  # fmt: skip
    made: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    if four_bit:
        _quantise(made.model.layers)
        made.is_loaded_in_4bit = True  # as transformers marks its models for PEFT
    return made


def _quantise(module: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit

    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            layer: Any = Linear4bit(
                child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            layer.load_state_dict(child.state_dict())
            setattr(module, name, layer.to("cpu"))  # where bitsandbytes quantises
        else:
            _quantise(child)


def task(number: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(number)
    return [torch.randint(128, (2, TOKENS), generator=draw) for _ in range(4)]


def loss_fn(net: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = net(input_ids=ids, labels=ids).loss
    return loss


def adapted(keeper: KeepLora) -> int:
    return sum(slot.weight.numel() for slot in keeper.slots)


def storages(tensors: Iterator[Tensor]) -> dict[int, int]:
    """Bytes by address."""
    held = {}
    for tensor in tensors:
        if tensor.device.type != "meta" and not isinstance(tensor, FakeTensor):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return held


def live() -> dict[int, int]:
    digest([("", torch.zeros(1))])  # whose 256 KiB of multipliers are there for all models
    gc.collect()
    return storages(thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))


def on_host(keeper: KeepLora) -> dict[int, int]:
    """What a GPU's model keeps in main memory."""

    def tensors() -> Iterator[Tensor]:
        for slot in keeper.slots:
            yield from (t for t in (slot.exact.start, slot.exact.total) if t is not None)
            for update in slot.exact.learned or ():
                yield from (update.a, update.b)
        for protected in keeper._protected or ():
            yield from protected.parts

    return storages(tensors())


def moment(keeper: KeepLora, before: dict[int, int]) -> dict[str, float]:
    """Bytes per adapted parameter beyond the model's."""
    host, everything = on_host(keeper), live()
    ours = {where: size for where, size in everything.items() if where not in before}
    count = adapted(keeper)
    return {
        "device": round(sum(size for where, size in ours.items() if where not in host) / count, 4),
        "host": round(sum(host.values()) / count, 4),
    }


def train(keeper: KeepLora, number: int, steps: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=1e-3)
    for ids in task(number)[:steps]:
        loss_fn(keeper.model, ids).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def keeplora(tasks: int, folder: Path) -> dict[str, Any]:
    net = model()
    before = live()
    keeper = KeepLora(net, KeepLoraConfig(**SETTINGS), progress=False)
    rows: dict[str, Any] = {"adapted parameters": adapted(keeper), "after wrapping": moment(keeper, before)}
    rows["switch"], rows["disk"] = [], []
    for number in range(tasks):
        budget = BUDGETS[number % len(BUDGETS)]
        object.__setattr__(keeper.config, "memory_budget", budget)
        keeper.before_task(task(number), loss_fn)
        rows["before_task"] = moment(keeper, before)
        optimizer = train(keeper, number)
        rows[f"training task {number + 1}"] = moment(keeper, before)
        del optimizer
        held = sum(on_host(keeper).values())
        activations, _ = recorded_bytes(torch.no_grad()(loss_fn), net, task(number)[0])
        peak, _ = recorded_bytes(keeper.after_task, task(number), loss_fn)
        rows[f"after task {number + 1}"] = moment(keeper, before)
        grown = sum(on_host(keeper).values()) - held
        rows["switch"].append({"budget": budget, "peak": peak, "host": grown, "activations": activations})
        had = {file.name for file in folder.glob("tensors-*")}
        keeper.save(folder)
        files = {file.name: file.stat().st_size for file in folder.glob("tensors-*")}
        rows["disk"].append(
            {
                "state": round(sum(files.values()) / adapted(keeper), 4),
                "written": round(sum(size for name, size in files.items() if name not in had) / adapted(keeper), 4),
            }
        )
        print(number + 1, rows[f"after task {number + 1}"], rows["switch"][-1], rows["disk"][-1], flush=True)
    return rows


def on_four_bits(tasks: int) -> dict[str, Any]:
    """Updates kept beside a 4-bit base; and stock PEFT's QLoRA in training."""
    net = model(four_bit=True)
    before = live()
    keeper = KeepLora(net, KeepLoraConfig(**SETTINGS), progress=False)
    rows: dict[str, Any] = {"after wrapping": moment(keeper, before)}
    for number in range(tasks):
        keeper.before_task(task(number), loss_fn)
        rows[f"task {number + 1} open"] = moment(keeper, before)
        optimizer = train(keeper, number)
        rows[f"training task {number + 1}"] = moment(keeper, before)
        del optimizer
        activations, _ = recorded_bytes(torch.no_grad()(loss_fn), net, task(number)[0])
        peak, _ = recorded_bytes(keeper.after_task, task(number), loss_fn)
        loss_fn(net, task(number)[0])  # the first forward brings the updates to the device
        rows[f"after task {number + 1}"] = {**moment(keeper, before), "switch": peak, "activations": activations}
    return {**rows, "PEFT": peft(four_bit=True)}


def peft(*, four_bit: bool = False) -> dict[str, float]:
    """Stock LoRA of the same rank on the same layers."""
    from peft import LoraConfig, get_peft_model

    net = model(four_bit=four_bit)
    before = live()
    wrapped = get_peft_model(net, LoraConfig(r=RANK, target_modules="all-linear"))
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for ids in task(0)[:2]:
        loss_fn(wrapped, ids).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    ours = {where: size for where, size in live().items() if where not in before}
    count = BLOCKS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
    return {"training": round(sum(ours.values()) / count, 4)}


def resident(folder: Path) -> dict[str, float]:
    """MiB that loading and saving take beyond the tensors, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", "--resident", str(folder)], capture_output=True, text=True, check=True
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _peak() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def _now() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def _resident(folder: Path) -> None:
    from keeplora.methods.state import State, read_state, write_state

    with tempfile.TemporaryDirectory() as other:
        write_state(other, State({"x": torch.zeros(8)}))
        read_state(other)  # what is loaded at first use
        Path("/proc/self/clear_refs").write_text("5")
        start = _now()
        state = read_state(folder)
        tensors = sum(t.numel() * t.element_size() for t in state.tensors.values()) / 2**20
        loading = _peak() - start - tensors
        Path("/proc/self/clear_refs").write_text("5")
        start = _now()
        write_state(other, State(state.tensors))
        print(json.dumps({"tensors": tensors, "load": round(loading, 1), "save": round(_peak() - start, 1)}))


def main() -> None:
    if sys.argv[1:2] == ["--resident"]:
        _resident(Path(sys.argv[2]))
        return
    if sys.argv[1:2] == ["--four-bit"]:
        print(json.dumps(on_four_bits(int(sys.argv[2]) if len(sys.argv) > 2 else 3), indent=1))
        return
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    tasks = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    folder = Path(tempfile.mkdtemp())
    try:
        results = {"peft": peft(), **keeplora(tasks, folder), "MiB beyond the tensors": resident(folder)}
    finally:
        shutil.rmtree(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    facts = {**machine(torch.device("cpu")), "command": "python -m bench.memory"}
    file.write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
