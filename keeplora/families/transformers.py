"""transformers: two-tower models, vision-language models, language models and encoders of text or images.

What is adapted is found from the structure of a model: its towers by the names the library gives them, the blocks of a
tower as its longest list of modules. Nothing outside of a known tower becomes a target: audio towers, projectors,
resamplers, heads and embeddings stay frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from keeplora.lora import Target, TokenMask

from ._blocks import block_targets, main_blocks
from ._given_masks import owns, padding_mask

__all__ = ["encoder_targets", "find_targets", "owns", "padding_mask", "token_mask"]

_VISION = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower", "video_tower")
_TOWERS = {"language_model": "language", "text_model": "text"} | dict.fromkeys(_VISION, "vision")
_TOWERS_OF = {"GitModel": {"image_encoder": "vision", "encoder": "language"}}
"""Models whose towers have names that mean something else elsewhere."""


@dataclass(frozen=True)
class _Stack:
    """The blocks of a tower, with their paths and depths, and the module they stand in."""

    tower: str
    blocks: list[tuple[str, nn.Module, int]]
    module: nn.Module


def find_targets(model: nn.Module, towers: Sequence[str] | None = None) -> list[Target]:
    """The linear layers and experts of the blocks of ``towers``, shallowest first, under transformers' names.

    * CLIP, SigLIP and other contrastive models: towers ``vision`` and ``text``, both by default.
    * LLaVA, Qwen-VL and other vision-language models: ``language`` by default, every linear layer of its blocks (q, k,
      v, o, gate, up and down of a Llama); ``vision`` where it is asked for. A projector is never a target.
    * Causal language models: ``language``. Encoders of images: ``vision``. Encoders of text: ``model``.

    Experts in weights of three dimensions are a target each: ``mlp.experts.3.gate_up_proj``
    ([`keeplora.lora.expert_layout`][]). Depth is the block's index. ``lm_head``, embeddings, pooling heads,
    cross-attention and routers are left out; a vision tower's fused ``attn.qkv`` becomes three row ranges.

    Raises:
        ValueError: the model has other towers than these (encoder-decoder models, audio), no such tower as asked for,
            or no ``nn.Linear`` in its blocks.

    Examples:
        >>> import transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> targets = find_targets(transformers.LlamaForCausalLM(config))
        >>> [t.name for t in targets if t.depth == 1][:3], targets[0].tower
        (['model.layers.1.self_attn.q_proj', 'model.layers.1.self_attn.k_proj', 'model.layers.1.self_attn.v_proj'],
        'language')
    """
    stacks = _stacks(model)
    there = list(dict.fromkeys(stack.tower for stack in stacks))
    if not there and not main_blocks(model):
        raise ValueError(
            f"find_targets: model must have nn.Linear layers in a list of blocks, got {type(model).__name__} with none "
            "(transformers' Conv1D, as in GPT-2, is not supported)."
        )
    if not there:
        raise ValueError(
            f"find_targets: model must be a two-tower, vision-language, language or encoder model of transformers, got "
            f"{type(model).__name__}. Pass targets, for example some of keeplora.lora.linear_targets(model)."
        )
    wanted = list(towers) if towers is not None else ["language"] if "language" in there else there
    targets: list[Target] = []
    for stack in stacks:
        if stack.tower in wanted:
            for path, block, depth in stack.blocks:
                targets += block_targets(path, block, depth, stack.tower, split_qkv=stack.tower == "vision")
    missing = [tower for tower in wanted if tower not in {target.tower for target in targets}]
    if missing:
        raise ValueError(
            f"find_targets: towers must be towers of the model with nn.Linear layers in their blocks, got "
            f"{', '.join(map(repr, missing))} of {type(model).__name__}. It has {', '.join(there)}."
        )
    return targets


def encoder_targets(path: str, encoder: nn.Module, tower: str) -> list[Target]:
    """The linear layers of the blocks of a single encoder that stands at ``path`` of another model."""
    return [t for inner, b, depth in main_blocks(encoder) for t in block_targets(f"{path}.{inner}", b, depth, tower)]


@contextmanager
def token_mask(model: nn.Module) -> Iterator[TokenMask]:
    """A mask of the tokens that are not padding, from the masks that the modules around each layer are given.

    First asked is the model of the library that a layer stands in, and what its user gave: ``[batch, tokens]``, longer
    where a cache holds earlier tokens or has empty places, or prepared ``[batch, heads, queries, keys]``, where a token
    counts that sees another one or is seen by one. Where that has other axes than the layer's tokens, the blocks are
    asked, and their masks that the model made for itself: flex attention's, or those of text behind an image. Without
    a mask every token counts. CLIP's text tower is causal and pools at the end-of-text token, so what stands behind it
    does not count either, mask or not. SigLIP's text tower sees its padding, as it did in pretraining: there padding
    counts unless an attention mask is passed.

    Warns:
        UserWarning: tokens are padded and a layer's input cannot be matched with them, or as many samples as tokens
            leave open which axis is which (all tokens of these layers count); a text has padding and no mask.
    """
    pools = hasattr(model, "text_projection")
    with padding_mask(model, pools_at_end=pools, sees_padding=_is_contrastive(model)) as mask:
        yield mask


# ---------------------------------------------------------------------- towers


def _stacks(model: nn.Module) -> list[_Stack]:
    """The blocks of the model's towers; empty where it has towers that are not known."""
    holder, path = _holder(model)
    if holder is None:
        tower = _single_tower(model)
        return [s for s in [_stack(model, "", tower)] if s.blocks] if tower else []
    contrastive = isinstance(getattr(holder, "logit_scale", None), nn.Parameter)
    towers, stacks = _towers(holder), []
    for name, child in holder.named_children():
        if name in towers:
            tower = towers[name]
            if _is_encoder_decoder(child):  # BLIP-2 on T5, Florence: two stacks in one
                return []
            if tower == "text" and not contrastive and "vision" in {towers.get(n) for n, _ in holder.named_children()}:
                tower = "language"  # Idefics and its kin call their language model text_model
            stack = _stack(child, f"{path}.{name}".lstrip("."), tower)
            stacks += [stack] if stack.blocks else []
    if not any(stack.tower == "language" for stack in stacks):
        known = [stack.module for stack in stacks]
        if _has_other_blocks(holder if contrastive else model, known):
            return []
    return stacks


def _towers(holder: nn.Module) -> dict[str, str]:
    """Towers by the names of the children that are."""
    return _TOWERS_OF.get(type(holder).__name__, _TOWERS)


def _holder(model: nn.Module) -> tuple[nn.Module | None, str]:
    """The shallowest module that has a tower among its children, and its path."""
    modules = sorted(model.named_modules(), key=lambda item: item[0].count(".") + bool(item[0]))
    for path, module in modules:
        towers = _towers(module)
        if any(name in towers and main_blocks(child) for name, child in module.named_children()):
            return module, path
    return None, ""


def _has_other_blocks(holder: nn.Module, known: Sequence[nn.Module]) -> bool:
    inside = {id(module) for owner in known for module in owner.modules()}
    lists = (module for module in holder.modules() if isinstance(module, nn.ModuleList) and id(module) not in inside)
    return any(isinstance(layer, nn.Linear) for blocks in lists for layer in blocks.modules())


def _is_encoder_decoder(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True


def _single_tower(model: nn.Module) -> str | None:
    """The tower of a model that has one; None for encoder-decoder models and for inputs other than text and images."""
    if _is_encoder_decoder(model):
        return None
    main_input = getattr(model, "main_input_name", None)
    if main_input == "pixel_values":
        return "vision"
    if main_input != "input_ids":
        return None
    if hasattr(model, "text_projection") or "text_model" in getattr(model.config, "model_type", ""):
        return "text"
    causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    return "language" if causal or type(model).__name__.endswith("ForCausalLM") else "model"


def _stack(module: nn.Module, path: str, tower: str) -> _Stack:
    blocks = [(f"{path}.{inner}".lstrip("."), block, depth) for inner, block, depth in main_blocks(module)]
    return _Stack(tower, blocks, module)


def _is_contrastive(model: nn.Module) -> bool:
    return any(isinstance(getattr(module, "logit_scale", None), nn.Parameter) for module in model.modules())
