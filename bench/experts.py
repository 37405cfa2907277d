"""What an expert costs, as their number grows: python -m bench.experts [--experts 8 16 32]

One block of Qwen3-MoE with random weights, 2 of its experts for a token, beside PEFT's ``target_parameters``. Bytes
are counted. Times are a thread's own (CPU time), medians in one process; PEFT has no task switch.
"""

import argparse
import copy
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.run import machine
from keeplora import KeepLora, KeepLoraConfig

HIDDEN, INNER, RANK, CHOSEN, SAMPLES, TOKENS = 256, 128, 16, 2, 4, 128


def mixture(experts: int, hidden: int = HIDDEN, inner: int = INNER) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=100, hidden_size=hidden, intermediate_size=inner, moe_intermediate_size=inner, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, head_dim=hidden // 4, num_experts=experts,
        num_experts_per_tok=CHOSEN,
    )  # fmt: skip
    model: nn.Module = transformers.Qwen3MoeForCausalLM(config).eval()
    return model


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def step(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The median CPU time of a call, after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


@contextmanager
def counting_kept(model: nn.Module) -> Iterator[list[int]]:
    """Bytes that forwards inside keep for their backward, without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    total: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(kept.values()))


def of_peft(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = ["experts.gate_up_proj", "experts.down_proj"]
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=names))


def row(experts: int, batch: dict[str, Tensor], repeats: int, **sizes: int) -> dict[str, float]:
    """What a block with so many experts costs; bytes and milliseconds per expert, steps in milliseconds."""
    model = mixture(experts, **sizes)
    peft = of_peft(copy.deepcopy(model))
    settings = {"target_modules": "experts", "weight_energy": 0.5, "feature_energy": 0.8, "r": RANK}
    keeper = KeepLora(model, KeepLoraConfig(**settings))
    found: dict[str, float] = {"experts": experts}
    start = time.process_time()
    keeper.before_task([batch], loss_fn)
    found["before_task_ms"] = 1e3 * (time.process_time() - start) / experts
    adapters = [slot.adapter for slot in keeper.slots if slot.adapter is not None]
    found["weights_bytes"] = sum(slot.weight.numel() * 4 for slot in keeper.slots) / experts
    found["adapters_bytes"] = sum(p.numel() * 4 for adapter in adapters for p in adapter.parameters()) / experts
    found["bases_bytes"] = sum(keeper.basis(slot.name).numel() * 4 for slot in keeper.slots) / experts
    found["moments_bytes"] = sum(4 * slot.weight.shape[1] ** 2 for slot in keeper.slots) / experts
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=1e-4)
    for mode in ("factored", "merged"):
        for slot in keeper.slots:
            slot.host.forward_mode = mode  # type: ignore[assignment]
        with counting_kept(model) as kept:
            loss_fn(model, batch)
        found[f"{mode}_kept_bytes"] = kept[0]
        found[f"{mode}_step_ms"] = 1e3 * seconds(lambda: step(model, batch, optimizer), repeats)
    trained = [p for p in peft.parameters() if p.requires_grad]
    other = torch.optim.AdamW(trained, lr=1e-4)
    with counting_kept(peft) as kept:
        loss_fn(peft, batch)
    found["peft_kept_bytes"] = kept[0]
    found["peft_step_ms"] = 1e3 * seconds(lambda: step(peft, batch, other), repeats)
    start = time.process_time()
    keeper.after_task([batch])
    found["after_task_ms"] = 1e3 * (time.process_time() - start) / experts
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of experts without a token
    ids = torch.randint(100, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    print(json.dumps(machine(torch.device("cpu"))))
    for experts in options.experts:
        print(json.dumps({name: round(value, 3) for name, value in row(experts, batch, options.repeats).items()}))
        gc.collect()


if __name__ == "__main__":
    main()
