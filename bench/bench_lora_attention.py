"""B6: forward and backward of attention with adapters on q, k, v and o, against the frozen one and PEFT's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.graphs import in_graph
from bench.harness import Case, cpu_has_bfloat16
from keeplora.lora import LoraAdapter, attention_targets, merge_ahead, wrap

RANK, WIDTH, HEADS = 16, 768, 12
GPU = ("ViT-B/16, batch 64", 64, 197)
CPU = ("ViT-B/16, batch 8", 8, 197)
CPU_EMULATED = ("ViT-B/16, batch 1, bfloat16 without instructions for it", 1, 197)


class Block(nn.Module):
    """Self-attention as open_clip's blocks call it."""

    def __init__(self, attn: nn.Module):
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return y


def setup(
    batch: int, tokens: int, dtype: torch.dtype, device: torch.device, width: int = WIDTH, heads: int = HEADS
) -> tuple[Any, ...]:
    """Inputs, one block per provider, all with the same frozen weights, and graphs."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.MultiheadAttention(width, heads, batch_first=True, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(batch, tokens, width, device=device).to(dtype).requires_grad_()
    grad = torch.randn(batch, tokens, width, device=device).to(dtype)
    models: dict[str, Any] = {"plain": Block(copy.deepcopy(base))}
    for name in ("keeplora", "frozen"):
        block = Block(copy.deepcopy(base))
        for slot in wrap(block, attention_targets("attn", base, 0, "vision")):
            if name == "keeplora":
                a, b, b0 = torch.randn(RANK, width) / width**0.5, torch.randn(width, RANK), torch.randn(width, RANK)
                slot.attach(LoraAdapter(a, b, 0.5, origin=b0))
        merge_ahead(block)
        models[name] = block
    config = LoraConfig(r=RANK, lora_alpha=RANK // 2, target_modules=["attn"], init_lora_weights=False)
    models["peft"] = get_peft_model(Block(copy.deepcopy(base)), config)
    for name, parameter in models["peft"].named_parameters():
        parameter.requires_grad_("lora_B" in name)  # A frozen, as ours
    return x, grad, models, {}


def run_model(name: str) -> Callable[[Tensor, Tensor, dict[str, Any], Any], None]:
    def call(x: Tensor, grad: Tensor, models: dict[str, Any], graphs: Any) -> None:
        x.grad = None
        models[name](x).backward(grad)

    return call


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        emulated = dtype == torch.bfloat16 and not cpu_has_bfloat16()
        label, batch, tokens = GPU if torch.cuda.is_available() else CPU_EMULATED if emulated else CPU
        providers: dict[str, Callable[..., None]] = {
            "keeplora": run_model("keeplora"),
            "frozen": run_model("frozen"),
            "frozen nn.MultiheadAttention": run_model("plain"),
            "PEFT": run_model("peft"),
            # not torch.compile of it: "Encountered a set_ on a graph input", PEFT 0.21 with torch 2.15
        }
        if torch.cuda.is_available():
            providers |= {f"{name}, CUDA graph": in_graph(providers[name]) for name in tuple(providers)}
        yield Case(
            id="B6",
            name=f"attention with LoRA fwd+bwd / {label}, {tokens} tokens, q k v o r {RANK} / {str(dtype)[6:]}",
            setup=partial(setup, batch, tokens, dtype),
            providers=providers,
            small=partial(setup, 1, 5, dtype),
        )
