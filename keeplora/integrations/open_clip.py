"""open_clip: the adapted weights of ViT image towers (its own and timm's) and of its text transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from keeplora.lora import LoraSlot, Target, TokenMask, attention_targets, register_host

from .open_clip_attention import attention_host
from .open_clip_attention import attention_targets as packed_targets

__all__ = ["find_targets", "is_open_clip", "token_mask"]

_TOWERS = (
    # path of the list of blocks, tower
    ("visual.transformer.resblocks", "vision"),
    ("visual.trunk.blocks", "vision"),
    ("transformer.resblocks", "text"),
    ("text.transformer.resblocks", "text"),
)


def is_open_clip(model: nn.Module) -> bool:
    """Whether ``model`` is one of open_clip's two-tower models (CLIP, CustomTextCLIP, CoCa)."""
    two_towers = ("CLIP", "CustomTextCLIP", "CoCa")
    return any(c.__module__.startswith("open_clip.") and c.__name__ in two_towers for c in type(model).__mro__)


def find_targets(model: nn.Module) -> list[Target]:
    """q, k, v, out_proj and the two MLP layers of every block of both towers, shallowest first.

    Names are transformers': ``visual.transformer.resblocks.3.attn.q_proj``, ``…attn.out_proj``, ``…mlp.c_fc``,
    ``…mlp.c_proj``; timm's fused ``attn.qkv`` becomes three row ranges, ``attn.proj`` keeps its name.
    Depth is the block's index; towers are ``vision`` and ``text``. CoCa's text decoder is left frozen.

    Raises:
        ValueError: no block of a known kind was found (a ResNet tower alone, say).
        TypeError: blocks use an attention of their own that reads its weights without calling a layer.

    Example:
        >>> import open_clip
        >>> model = open_clip.create_model("ViT-S-32", device="meta")
        >>> targets = find_targets(model)
        >>> len(targets), targets[0].name
        (144, 'visual.transformer.resblocks.0.attn.q_proj')
    """
    modules = dict(model.named_modules())
    targets: list[Target] = []
    for path, tower in _TOWERS:
        blocks = modules.get(path)
        if isinstance(blocks, nn.ModuleList | nn.Sequential):
            for depth, block in enumerate(blocks):
                targets += _block_targets(f"{path}.{depth}", block, depth, tower)
    if not targets:
        raise ValueError(
            f"find_targets: model must have a ViT or a text transformer of open_clip, got "
            f"{type(model).__name__} without either. Pass targets=keeplora.lora.linear_targets(model)."
        )
    return targets


def _block_targets(path: str, block: nn.Module, depth: int, tower: str) -> list[Target]:
    targets: list[Target] = []
    attention = getattr(block, "attn", None)
    if isinstance(attention, nn.MultiheadAttention):
        targets += attention_targets(f"{path}.attn", attention, depth, tower)
    elif type(attention).__module__ == "open_clip.transformer" and type(attention).__name__ == "Attention":
        assert isinstance(attention, nn.Module)
        register_host(type(attention), attention_host())
        targets += packed_targets(f"{path}.attn", attention, depth, tower)
    elif attention is not None and hasattr(attention, "in_proj_weight"):
        raise TypeError(
            f"find_targets: attention must be nn.MultiheadAttention, open_clip's or timm's, got "
            f"{type(attention).__module__}.{type(attention).__name__} at {path}.attn, which reads its weights without "
            "calling a layer. Pass targets that leave it out."
        )
    for name, layer in block.named_modules():
        if not isinstance(layer, nn.Linear) or (name.startswith("attn.") and hasattr(attention, "in_proj_weight")):
            continue
        full = f"{path}.{name}"
        if name == "attn.qkv":
            width = layer.out_features // 3
            targets += [
                Target(f"{path}.attn.{letter}_proj", full, "weight", (i * width, (i + 1) * width), depth, tower)
                for i, letter in enumerate("qkv")
            ]
        else:
            targets.append(Target(full, full, "weight", None, depth, tower))
    return targets


@contextmanager
def token_mask(model: nn.Module) -> Iterator[TokenMask]:
    """A mask of the text tokens that can reach the text embedding: those up to the end-of-text token.

    open_clip's text transformer is causal and pools at the highest token id, so what stands behind it is padding
    and must not count in a feature statistic. The mask follows the ids that the token embedding was last given.
    Text towers that pool elsewhere (``text_pool_type`` other than argmax or eos) are not masked.
    """
    text = getattr(model, "text", model)
    embedding = getattr(text, "token_embedding", None)
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    seen: list[Tensor] = []

    def remember(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        seen[:] = [args[0]]

    def mask(slot: LoraSlot, x: Tensor) -> Tensor | None:
        if slot.target.tower != "text" or not seen:
            return None
        ids = seen[0]
        end = getattr(text, "text_eos_id", getattr(text, "eos_id", None)) if pool == "eos" else None
        last = (ids.argmax(-1) if end is None else (ids == end).int().argmax(-1)).unsqueeze(-1)
        keep = torch.arange(ids.shape[-1], device=ids.device) <= last
        return keep if keep.shape == x.shape[:-1] else None

    if embedding is None or pool not in ("argmax", "eos"):
        yield lambda slot, x: None
        return
    handle = embedding.register_forward_hook(remember)
    try:
        yield mask
    finally:
        handle.remove()
