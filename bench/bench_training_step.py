"""B8: a whole training step of CLIP with adapters on q, k, v, o of both towers, against the frozen model and PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.graphs import in_graph
from bench.harness import Case, cpu_has_bfloat16
from keeplora.families import find_targets
from keeplora.lora import LoraAdapter, LoraHost, merge_ahead, select_targets, wrap

RANK = 16
GPU = ("CLIP ViT-B/16, batch 64", 64, {}, {})
CPU = (
    "CLIP ViT-B/16 cut to two blocks, batch 4", 4,
    {"layers": 2, "width": 768, "image_size": 224, "patch_size": 16}, {"layers": 2},
)  # fmt: skip


def clip_model(vision: dict[str, Any], text: dict[str, Any]) -> nn.Module:
    """open_clip's ViT-B/16 without weights; the settings given replace those of its towers."""
    from open_clip.factory import _MODEL_CONFIGS
    from open_clip.model import CLIP

    config = copy.deepcopy(_MODEL_CONFIGS["ViT-B-16"])
    return CLIP(config["embed_dim"], {**config["vision_cfg"], **vision}, {**config["text_cfg"], **text})


def step(
    model: nn.Module, trained: list[nn.Parameter], images: Tensor, tokens: Tensor, optimizer: Any, autocast: bool
) -> None:
    """Forward, backward and an optimizer step of the contrastive loss, in bfloat16 autocast if ``autocast``."""
    for parameter in trained:
        parameter.grad = None
    with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
        image, text, scale = model(images, tokens)
        logits = scale * image @ text.T
        loss = nn.functional.cross_entropy(logits.float(), torch.arange(len(images), device=images.device))
    loss.backward()
    if optimizer is not None:
        optimizer.step()


def setup(
    batch: int, vision: dict[str, Any], text: dict[str, Any], autocast: bool, device: torch.device, update: bool = True
) -> tuple[Any, ...]:
    """A step per provider, all with the same weights, and graphs; in the frozen one the first block wants a gradient.

    ``update``: with a step of AdamW where something is trained.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = clip_model(vision, text).to(device).eval().requires_grad_(False)
    size = base.visual.image_size  # type: ignore[union-attr]
    images = torch.randn(batch, 3, *size, device=device)
    tokens = torch.randint(1, base.vocab_size, (batch, 77), device=device)  # type: ignore[arg-type]

    def ours(mode: str) -> Any:
        model = copy.deepcopy(base)
        slots = wrap(model, select_targets(find_targets(model), ["attn"]))
        for slot in slots:
            out, width = slot.weight.shape
            b = torch.randn(out, RANK) / RANK**0.5  # from where the update counts, as the method sets it
            slot.attach(LoraAdapter(torch.randn(RANK, width) / width**0.5, b, 1.0, origin=b))
        for module in model.modules():
            if isinstance(module, LoraHost):
                module.forward_mode = mode  # type: ignore[assignment]
        merge_ahead(model)
        return model

    peft = get_peft_model(copy.deepcopy(base), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["attn"]))
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_("lora_B" in name)  # A frozen, as ours
    # A frozen model's step: a gradient down to the first block's input, and nothing to update.
    plain = copy.deepcopy(base)
    frozen = copy.deepcopy(base)
    wrap(frozen, select_targets(find_targets(frozen), ["attn"]))
    for model in (plain, frozen):
        model.visual.class_embedding.requires_grad_(True)  # type: ignore[union-attr]
        model.positional_embedding.requires_grad_(True)  # type: ignore[union-attr]
    models: dict[str, Any] = {
        "ours": ours("auto"), "factored": ours("factored"), "peft": peft, "frozen": frozen, "plain": plain,
    }  # fmt: skip
    ready = {}
    for name, model in models.items():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = (
            torch.optim.AdamW(trained, lr=1e-4, capturable=device.type == "cuda")
            if update and name not in ("frozen", "plain")
            else None
        )
        ready[name] = partial(step, model, trained, images, tokens, optimizer, autocast)
    return ready, {}


def provider(name: str) -> Callable[[dict[str, Any], Any], None]:
    return lambda ready, graphs: ready[name]()


def cases() -> Iterator[Case]:
    label, batch, vision, text = GPU if torch.cuda.is_available() else CPU
    autocast = torch.cuda.is_available() or cpu_has_bfloat16()
    providers: dict[str, Callable[..., None]] = {
        "keeplora": provider("ours"),
        "frozen model": provider("frozen"),
        "frozen model, nn.MultiheadAttention": provider("plain"),
        "PEFT": provider("peft"),
        # not torch.compile of it: "Encountered a set_ on a graph input", from PEFT's attention (0.21, torch 2.15)
        "keeplora, factored (as the public code's layers)": provider("factored"),
    }
    if torch.cuda.is_available():
        providers |= {f"{name}, CUDA graph": in_graph(providers[name]) for name in ("keeplora", "frozen model", "PEFT")}
    yield Case(
        id="B8",
        name=f"training step / {label}, LoRA q k v o r {RANK} of both towers, "
        + ("bf16 autocast" if autocast else "float32 (a CPU without bfloat16 instructions)"),
        setup=partial(setup, batch, vision, text, autocast),
        providers=providers,
        small=partial(
            setup, 2, {"layers": 1, "width": 64, "image_size": 32, "patch_size": 16}, {"layers": 1}, autocast
        ),
    )
