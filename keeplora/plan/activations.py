"""What a block keeps of every token for the backward pass, counted on the meta device: the block's own code runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from keeplora.families import find_targets
from keeplora.lora import LoraAdapter, wrap

__all__ = ["Kind", "kept_by_block"]

Kind = Literal["keeplora", "factored", "peft"]


class _Flash(torch.autograd.Function):
    """Keeps what flash attention does: q, k, v, the output and one number per row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError  # nothing is trained here


def _attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    out: Tensor = _Flash.apply(q, k, v)
    return out.transpose(1, 2), None


def kept_by_block(
    config: Any,
    dtype: torch.dtype,
    rank: int,
    kind: Kind,
    tokens: int,
    *,
    device: str = "meta",
) -> int:
    """Bytes of one block of the language model with adapters on all linear layers, without checkpointing.

    With KeepLoRA's layers that is ``t = x Aᵀ`` instead of x, and small merged weights where merging is cheaper
    (``keeplora.lora.forward``).

    Args:
        config: transformers' config; its ``text_config`` where it has one.
        kind: KeepLoRA's layers, such that never merge, as quantised ones, or stock PEFT's with float32 adapters, as
            ``get_peft_model`` makes them.
        tokens: Of the whole batch.
        device: Where to count; the meta device needs no memory.
    """
    one, two = (_saved(config, dtype, rank, kind, tokens, blocks, device) for blocks in (1, 2))
    return two - one  # without embeddings, head and position tables


def _saved(config: Any, dtype: torch.dtype, rank: int, kind: str, tokens: int, blocks: int, device: str) -> int:
    import transformers

    automatic: Any = transformers.AutoModel
    transformers.AttentionInterface.register("keeplora_plan", _attend)
    text = copy.deepcopy(getattr(config, "text_config", config))
    text.num_hidden_layers = blocks
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1] * blocks
    text._attn_implementation = "keeplora_plan"
    with torch.device(device):
        model: nn.Module = automatic.from_config(text, dtype=dtype).requires_grad_(False).train()
        x = torch.empty(1, tokens, text.hidden_size, dtype=dtype, requires_grad=True)
        called = _with_adapters(model, rank, kind)
        own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        kept: dict[int, Any] = {}  # storages are held, so that no two have one address

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor), _without_autocast(device):
            called(inputs_embeds=x, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    """PEFT turns autocast off around experts' weights, and torch knows no autocast for the meta device."""
    before: Any = torch.autocast
    if device == "meta":
        torch.autocast = lambda *_, **__: nullcontext()  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.autocast = before  # type: ignore[misc]


def _with_adapters(model: nn.Module, rank: int, kind: str) -> Any:
    targets = find_targets(model)
    if kind == "peft":
        from peft import LoraConfig, get_peft_model

        experts = sorted({f"{t.module}.{t.parameter}" for t in targets if t.expert is not None})
        layers = [t.module for t in targets if t.expert is None]
        peft: Any = get_peft_model(model, LoraConfig(r=rank, target_modules=layers, target_parameters=experts or None))
        return peft.base_model.model
    for slot in wrap(model, targets):
        out, width = slot.weight.shape
        slot.attach(LoraAdapter(torch.empty(min(rank, width), width), torch.empty(out, min(rank, width)), 1.0))
        if kind == "factored":
            slot.host.forward_mode = "factored"
    return model
