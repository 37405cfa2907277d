"""open_clip: the adapted weights of ViT image towers (its own, timm's) and of text transformers (its own, HF's)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.lora import LoraSlot, Target, TokenMask, register_host

from . import transformers
from ._blocks import block_targets
from ._open_clip_attention import attention_host
from ._open_clip_attention import attention_targets as packed_targets
from ._padding import Matched, match, mismatch, untold
from ._timm_attention import eva_host

__all__ = ["find_targets", "owns", "token_mask"]

_TOWERS = (
    # path of the list of blocks, tower
    ("visual.transformer.resblocks", "vision"),
    ("visual.trunk.blocks", "vision"),
    ("visual.trunk.layers", "vision"),  # Swin: stages of blocks
    ("transformer.resblocks", "text"),
    ("text.transformer.resblocks", "text"),
)


def owns(model: nn.Module) -> bool:
    """Whether ``model`` is one of open_clip's two-tower models (CLIP, CustomTextCLIP, CoCa)."""
    two_towers = ("CLIP", "CustomTextCLIP", "CoCa")
    return any(c.__module__.startswith("open_clip.") and c.__name__ in two_towers for c in type(model).__mro__)


def find_targets(model: nn.Module, towers: Sequence[str] | None = None) -> list[Target]:
    """q, k, v, out_proj and the MLP layers of every block of ``towers`` (both by default), shallowest first.

    Names are open_clip's: ``visual.transformer.resblocks.3.attn.q_proj``, ``…attn.out_proj``, ``…mlp.c_fc``,
    ``…mlp.c_proj``; timm's fused ``attn.qkv`` becomes three row ranges, ``attn.proj`` keeps its name; text towers from
    transformers keep theirs (``text.transformer.encoder.layer.0.attention.self.query``).
    Depth is the block's index; towers are ``vision`` and ``text``. Pooling heads, projections, convolutional towers
    (ResNet, ConvNeXt, FastViT) and CoCa's text decoder are left frozen.

    Raises:
        ValueError: no block of a known kind was found.
        TypeError: blocks use an attention of their own that reads its weights without calling a layer.

    Examples:
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
            for depth, (inner, block) in enumerate(_blocks(path, blocks)):
                targets += _block_targets(inner, block, depth, tower)
    encoder = _hf_encoder(model)
    if encoder is not None:
        targets += transformers.encoder_targets("text.transformer", encoder, "text")
    if not targets:
        raise ValueError(
            f"find_targets: model must have a ViT or a text transformer of open_clip, got "
            f"{type(model).__name__} without either. Pass targets=keeplora.lora.linear_targets(model)."
        )
    return [target for target in targets if towers is None or target.tower in towers]


def _blocks(path: str, blocks: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a list, or of the stages in it, with their paths; nothing of stages without attention."""
    for name, block in blocks.named_children():
        inner = getattr(block, "blocks", None)
        if isinstance(inner, nn.ModuleList | nn.Sequential):
            yield from _blocks(f"{path}.{name}.blocks", inner)
        elif hasattr(block, "attn"):
            yield f"{path}.{name}", block


def _hf_encoder(model: nn.Module) -> nn.Module | None:
    """The text tower that open_clip took from transformers."""
    encoder = getattr(getattr(model, "text", None), "transformer", None)
    return encoder if isinstance(encoder, nn.Module) and transformers.owns(encoder) else None


def _block_targets(path: str, block: nn.Module, depth: int, tower: str) -> list[Target]:
    attention = block.attn
    assert isinstance(attention, nn.Module)
    kind = (type(attention).__module__, type(attention).__name__)
    inside: list[Target] = []
    if kind == ("open_clip.transformer", "Attention"):
        register_host(type(attention), attention_host())
        inside = packed_targets(f"{path}.attn", attention, depth, tower)
    elif hasattr(attention, "in_proj_weight") and not isinstance(attention, nn.MultiheadAttention):
        raise TypeError(
            f"find_targets: attention must be nn.MultiheadAttention, open_clip's or timm's, got "
            f"{kind[0]}.{kind[1]} at {path}.attn, which reads its weights without calling a layer. Pass targets that "
            "leave it out."
        )
    elif kind == ("timm.models.eva", "EvaAttention"):
        register_host(type(attention), eva_host(), reads="qkv")
    others = block_targets(path, block, depth, tower, split_qkv=True)
    return [*inside, *(t for t in others if not inside or not t.name.startswith(f"{path}.attn."))]


@contextmanager
def token_mask(model: nn.Module) -> Iterator[TokenMask]:
    """A mask of the text tokens that can reach the text embedding.

    A causal text transformer that pools at the end-of-text token (the highest id, or ``eos_id``) counts the tokens up
    to it; one that masks its padding (``use_pad_mask``, CoCa's class token) counts what is not padding, and so does a
    text tower from transformers. What a bidirectional tower attends to counts, padding or not: SigLIP's, which was
    pretrained so. The mask follows the ids that the text tower was last given.
    """
    encoder = _hf_encoder(model)
    if encoder is not None:
        with transformers.padding_mask(encoder) as mask:
            yield mask
        return
    text = getattr(model, "text", model)
    embedding = getattr(text, "token_embedding", None)
    sequence_first = not getattr(getattr(text, "transformer", None), "batch_first", True)
    seen: list[Tensor | None] = []
    matches: dict[Any, Matched | None] = {}  # of inputs with the same axes

    def remember(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        seen[:] = [_reaching(text, args[0])]
        matches.clear()

    def text_mask(slot: LoraSlot, x: Tensor) -> Tensor | None:
        keep = seen[0] if slot.target.tower == "text" and seen else None
        if keep is None:
            return None
        key = (x.shape[:-1], x.device)
        if key not in matches:
            matches[key] = match([keep], x, sequence_first)
        matched = matches[key]
        if matched is None:
            layers.mismatched.setdefault(slot.name, mismatch([keep], x))
        return None if matched is None else matched.keep

    handles = [embedding.register_forward_hook(remember)] if isinstance(embedding, nn.Module) else []
    try:
        with untold(model) as layers:
            yield text_mask
    finally:
        for handle in handles:
            handle.remove()


def _reaching(text: nn.Module, ids: Tensor) -> Tensor | None:
    """``[batch, tokens]``, True where a token can reach the text embedding; None if all can."""
    pad = getattr(text, "pad_id", 0)
    if getattr(text, "cls_emb", None) is not None:  # CoCa's class token stands behind the text
        keep, one = ids != pad, ids.new_ones(len(ids), 1, dtype=torch.bool)
        if not getattr(text, "correct_cls_mask", False):  # published weights: one place off
            keep = torch.cat([one, keep[:, :-1]], 1)
        return torch.cat([keep, one], 1)
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    if getattr(text, "attn_mask", None) is None:  # bidirectional
        if not getattr(text, "use_pad_mask", False):
            return None
        keep = ids != pad
        if pool in ("first", "last"):  # where the embedding is read, padding or not
            keep[:, 0 if pool == "first" else -1] = True
        return keep
    if pool not in ("argmax", "eos"):
        return None
    end = getattr(text, "text_eos_id", getattr(text, "eos_id", None)) if pool == "eos" else None
    last = (ids.argmax(-1) if end is None else (ids == end).int().argmax(-1)).unsqueeze(-1)
    return torch.arange(ids.shape[-1], device=ids.device) <= last
