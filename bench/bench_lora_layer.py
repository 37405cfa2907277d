"""B6: forward and backward of one LoRA layer, against the frozen layer it sits on, PEFT's, and a hand-written one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.graphs import in_graph
from bench.harness import Case
from keeplora.lora import LoraAdapter, Target, wrap

RANK = 16
# label, tokens, in, out, dtypes; on a CPU the sizes METHOD's targets were measured at
GPU_SIZES = [("qkv of ViT-B/16, batch 64", 12608, 768, 2304), ("d 4096", 8192, 4096, 4096)]
CPU_SIZES = [("one layer of ViT-B/16", 2048, 768, 768)]


class HandWritten(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ with addmm: the shortest fast version for a frozen A, saving t and not x."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):  # type: ignore[no-untyped-def]
        a, b = a.to(x.dtype), b.to(x.dtype)
        t = x @ a.T
        y = torch.addmm(bias, x, weight.T).addmm_(t, b.T, alpha=scale)
        ctx.save_for_backward(t, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        t, weight, a, b = ctx.saved_tensors
        grad_x = (grad @ weight).addmm_(grad @ b, a, alpha=ctx.scale)
        return grad_x, None, None, None, (grad.T @ t).float() * ctx.scale, None


def layer_of(d_in: int, d_out: int, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(d_in, d_out, device=device, dtype=dtype)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    return layer


def setup(tokens: int, d_in: int, d_out: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Inputs, one model per provider, all with the same frozen weight and adapter sizes, and graphs."""
    from peft import LoraConfig, get_peft_model

    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, d_in, generator=generator, device=device).to(dtype).requires_grad_()
    grad = torch.randn(tokens, d_out, generator=generator, device=device).to(dtype)
    frozen = layer_of(d_in, d_out, device, dtype)
    a = torch.linalg.qr(torch.randn(d_in, RANK, generator=generator, device=device)).Q.T.contiguous()
    b = torch.randn(d_out, RANK, generator=generator, device=device)

    holder = nn.Sequential(layer_of(d_in, d_out, device, dtype))
    [slot] = wrap(holder, [Target("0", "0", "weight", None, 0, "model")])
    slot.attach(LoraAdapter(a, b, 0.5, origin=torch.randn_like(b)))

    def peft(**kwargs):  # type: ignore[no-untyped-def]
        base = nn.Sequential(layer_of(d_in, d_out, device, dtype))
        config = LoraConfig(r=RANK, lora_alpha=RANK // 2, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(base, config, **kwargs)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name)  # A frozen, as ours
        return model

    models = {"frozen": frozen, "keeplora": holder, "peft": peft(), "peft_same": peft(autocast_adapter_dtype=False)}
    models["peft_compiled"] = torch.compile(peft(autocast_adapter_dtype=False))
    models["hand"] = (frozen, a, b.requires_grad_())
    return x, grad, models, {}


def run_model(name: str) -> Callable[[Tensor, Tensor, dict, dict], None]:
    def call(x: Tensor, grad: Tensor, models: dict, graphs: dict) -> None:
        x.grad = None
        models[name](x).backward(grad)

    return call


def run_hand(x: Tensor, grad: Tensor, models: dict, graphs: dict) -> None:
    x.grad = None
    frozen, a, b = models["hand"]
    b.grad = None
    HandWritten.apply(x, frozen.weight, frozen.bias, a, b, 0.5).backward(grad)


def cases() -> Iterator[Case]:
    for label, tokens, d_in, d_out in GPU_SIZES if torch.cuda.is_available() else CPU_SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            providers: dict[str, Callable[..., None]] = {
                "keeplora": run_model("keeplora"),
                "frozen layer": run_model("frozen"),
                "hand-written addmm": run_hand,
                "PEFT": run_model("peft"),
            }
            if torch.cuda.is_available():
                graphs = ("keeplora", "frozen layer", "hand-written addmm", "PEFT")
                providers |= {f"{name}, CUDA graph": in_graph(providers[name]) for name in graphs}
            if dtype != torch.float32:
                providers["PEFT, adapters in the base's dtype"] = run_model("peft_same")
            providers["PEFT, adapters in the base's dtype, torch.compile"] = run_model("peft_compiled")
            size = dtype.itemsize
            yield Case(
                id="B6",
                name=f"LoRA layer fwd+bwd / {label}, {tokens} tokens, {d_in}->{d_out}, r {RANK} / {str(dtype)[6:]}",
                setup=lambda device, s=(tokens, d_in, d_out), d=dtype: setup(*s, d, device),
                providers=providers,
                bytes=size * (2 * tokens * (d_in + d_out) + 2 * d_in * d_out),
                flops=4 * tokens * d_in * d_out,
                small=lambda device, d=dtype: setup(32, 24, 24, d, device),
            )
