"""The masks that the modules of a model of transformers are given, and which layers they are for."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.lora import LoraSlot, TokenMask
from keeplora.lora.shares import class_before

from ._padding import Matched, match, mismatch, nothing_hidden, untold

__all__ = ["owns", "padding_mask"]

_MASKS = ("attention_mask", "pixel_attention_mask", "patch_attention_mask")
_HIDES = ("input_mask", "decoder_padding_mask")
"""XLNet's other mask and that of FSMT's decoder: 1 is padding."""
_OF_ENCODER = ("encoder_attention_mask", "encoder_padding_mask")
_SEQUENCE_FIRST = {
    "XLNetModel": "xlnet",
    "LongformerSelfAttention": "longformer",
    "LEDEncoderSelfAttention": "led",
    "EncoderLayer": "fsmt",
    "DecoderLayer": "fsmt",
}
"""Modules whose layers see ``[tokens, batch, width]``, with their models; all others ``[batch, tokens, width]``."""


def owns(model: nn.Module) -> bool:
    """Whether ``model`` is a ``transformers.PreTrainedModel``."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(model).__mro__
    )


@contextmanager
def padding_mask(model: nn.Module, *, pools_at_end: bool = False, sees_padding: bool = False) -> Iterator[TokenMask]:
    """The mask of layers inside ``model``, from what the forwards around them were last given."""
    chains, firsts = _chains(model)
    owners = {path: module for path, module in model.named_modules() if owns(module)}
    around = {
        id(module): [owner for outer, owner in owners.items() if not outer or path.startswith(f"{outer}.")]
        for path, module in model.named_modules()
    }
    given: dict[int, _Given] = {}
    ordered: dict[int, bool] = {}  # layers of unknown models whose axes were told apart: tokens before samples

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = _arguments(module, args, kwargs)
        outer = [given[id(owner)] for owner in around[id(module)] if owner is not module and id(owner) in given]
        given[id(module)] = here = _given(arguments, _names(type(module).forward), _pad_token(around[id(module)]))
        ids = arguments.get("input_ids")
        if not here.masks and isinstance(ids, Tensor):  # one that a model around it did not hand on
            handed = (text.mask for asked in outer for text in asked.texts if text.is_of(ids))
            here.masks = next(([mask] for mask in handed if getattr(mask, "shape", None) == ids.shape), [])
        if pools_at_end and owns(module):
            here.masks = [*here.masks, *_up_to_end(module, ids)]

    def mask(slot: LoraSlot, x: Tensor) -> Tensor | None:
        modules = chains.get(id(slot.host), ())
        chain = [given[id(module)] for module in modules if id(module) in given]
        known = firsts.get(id(slot.host))
        if known is None:  # not the library's own code: as its layers were seen to be
            evident = {ordered.get(id(slot.host))} if x.dim() > 2 else set(ordered.values())
            known = evident.pop() if len(evident) == 1 else None
        others = [asked for asked in chain if asked.is_other(x)]
        told = None
        for asked in others or chain:
            matched = asked.match(x, known, chain[0].past)
            if matched is None:
                told = told or asked.mismatch(x)
                continue
            if matched.sequence_first is not None:
                ordered[id(slot.host)] = matched.sequence_first
            if asked.masks_of(x):
                return matched.keep
        if told is not None:
            layers.mismatched.setdefault(slot.name, told)
        elif not others and not sees_padding and modules:
            outer = [owner for owner in around[id(modules[0])] if owner not in modules]
            padded = _padded((*outer, *modules), len(outer), given, x)
            if padded is not None:
                layers.unmasked.setdefault(slot.name, padded)
        return None

    handles = [
        module.register_forward_pre_hook(remember, with_kwargs=True)
        for module in dict.fromkeys(module for chain in chains.values() for module in chain)
    ]
    try:
        with untold(model) as layers:
            yield mask
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Text:
    """The ids that a forward was given, with their mask if it was given one."""

    ids: Tensor
    mask: Any
    pad: int | None

    def is_of(self, ids: Tensor) -> bool:
        return (self.ids.data_ptr(), self.ids.shape) == (ids.data_ptr(), ids.shape)

    @functools.cached_property
    def is_padded(self) -> bool:
        """Whether its mask hides a token; without one, whether a text begins or ends with at least two pad tokens."""
        if self.mask is not None:
            return getattr(self.mask, "ndim", 0) == 2 and not nothing_hidden([self.mask])
        if self.pad is None or self.ids.dim() != 2 or self.ids.shape[1] < 2:
            return False
        padding = self.ids == self.pad
        return bool((padding[:, :2].all(1) | padding[:, -2:].all(1)).any())


@dataclass
class _Given:
    """What a forward was given about its tokens, and about those of another stack that its layers read, too."""

    masks: list[Any]
    past: int | None
    texts: list[_Text]
    other: Tensor | None
    other_masks: list[Any]
    by_shape: bool = False  # whether layers see the other stack as other tensors than this one, of its shape
    unclear: bool = False  # whether that is the shape of the tokens, too
    matches: dict[Any, Matched | None] = field(default_factory=dict)

    def is_other(self, x: Tensor) -> bool:
        """Whether x is the other stack's, its axes swapped or not."""
        other = self.other
        if other is None:
            return False
        same = x.data_ptr() == other.data_ptr() and x.shape in (other.shape, other.transpose(0, 1).shape)
        return same or (self.by_shape and x.shape[:-1] == other.shape[:-1])

    def masks_of(self, x: Tensor) -> list[Any]:
        return self.other_masks if self.is_other(x) else self.masks

    def match(self, x: Tensor, sequence_first: bool | None, past: int | None) -> Matched | None:
        """``match``, once for all layers whose inputs have the same axes."""
        masks = self.masks_of(x)
        key = (masks is self.other_masks, x.shape[:-1], x.device, sequence_first)
        if key not in self.matches:
            matched: Matched | None = Matched(None, None)
            if masks is self.other_masks and self.unclear:
                matched = None
            elif masks:
                matched = match(masks, x, sequence_first, None if masks is self.other_masks else past)
            self.matches[key] = matched
        return self.matches[key]

    def mismatch(self, x: Tensor) -> str | None:
        masks = self.masks_of(x)
        return None if nothing_hidden(masks) else mismatch(masks, x)


def _given(arguments: Mapping[str, Any], takes: Sequence[str], pad: int | None) -> _Given:
    masks = [arguments[name] for name in _MASKS if arguments.get(name) is not None][:1]
    if arguments.get("key_value_states") is not None or "decoder_attention_mask" in takes:
        masks = []  # of cross-attention, or of an encoder with a decoder beside it: these are asked themselves
    if not masks:
        masks = [arguments[name] == 0 for name in _HIDES if arguments.get(name) is not None][:1]
    texts = [
        _Text(arguments[f"{stack}input_ids"], arguments.get(f"{stack}attention_mask"), pad)
        for stack in ("", "decoder_")
        if isinstance(arguments.get(f"{stack}input_ids"), Tensor)
    ]
    others = arguments.get("global_hidden_states")
    if isinstance(others, Tensor):  # Pegasus-X's: tokens of its own beside those of the text, which all count
        tokens = arguments.get("hidden_states", arguments.get("token_hidden_states"))
        unclear = isinstance(tokens, Tensor) and tokens.shape == others.shape
        return _Given(masks, None, texts, others, [*masks] if unclear else [], by_shape=True, unclear=unclear)
    other = arguments.get("encoder_hidden_states")
    other_masks = [arguments[name] for name in _OF_ENCODER if arguments.get(name) is not None][:1]
    return _Given(masks, _past(arguments), texts, other if isinstance(other, Tensor) else None, other_masks)


def _padded(modules: Sequence[nn.Module], outer: int, given: Mapping[int, _Given], x: Tensor) -> str | None:
    """Which of the modules around a layer, the first ``outer`` of them beyond its model, was given padding that no
    mask tells of; the innermost that was given a text of the layer's tokens decides."""
    count = math.prod(x.shape[:-1])
    for i, module in reversed(list(enumerate(modules))):
        texts = given[id(module)].texts if id(module) in given else []
        fitting = [text for text in texts if i >= outer or text.ids.numel() == count]
        if fitting:
            return type(module).__name__ if any(text.is_padded for text in fitting) else None
    return None


def _pad_token(owners: Sequence[nn.Module]) -> int | None:
    """The pad token of the innermost model around a layer that has one."""
    for owner in reversed(owners):
        config = getattr(owner, "config", None)
        for of in (config, getattr(config, "text_config", None)):
            pad = getattr(of, "pad_token_id", None)
            if isinstance(pad, int):
                return pad
    return None


def _past(arguments: Mapping[str, Any]) -> int | None:
    """How many tokens the cache holds; None without one."""
    cache = arguments.get("past_key_values", arguments.get("cache"))
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # of states only: they have no length
            return None
    return int(cache[0][0].shape[-2]) if isinstance(cache, tuple | list) and cache else None


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_names(type(module).forward), args, strict=False)), **kwargs}


@functools.cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(forward).parameters if name != "self")


def _chains(model: nn.Module) -> tuple[dict[int, tuple[nn.Module, ...]], dict[int, bool]]:
    """By module: the modules around it that are given masks, from the library's innermost model inwards; and which of
    the axes of its input is that of the tokens, where that is known."""
    chains: dict[str, tuple[nn.Module, ...]] = {}
    firsts: dict[str, bool] = {}
    of: dict[int, tuple[nn.Module, ...]] = {}
    first_of: dict[int, bool] = {}
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0] if path else None
        chain = () if parent is None or owns(module) else chains.get(parent, ())
        takes = owns(module) or not {*_MASKS, *_HIDES}.isdisjoint(_names(type(module).forward))
        of[id(module)] = chains[path] = (*chain, module) if takes else chain
        kind = class_before(module)
        if f".{_SEQUENCE_FIRST.get(kind.__name__, '-')}." in kind.__module__:
            firsts[path] = True
        elif owns(module):
            if kind.__module__.startswith("transformers."):
                firsts[path] = False
        elif parent is not None and parent in firsts:
            firsts[path] = firsts[parent]
        if path in firsts:
            first_of[id(module)] = firsts[path]
    return of, first_of


def _up_to_end(module: nn.Module, ids: Any) -> list[Tensor]:
    """Without what stands behind the end-of-text token at which a causal tower pools, as CLIP's does."""
    eos = getattr(module, "eos_token_id", None)
    if eos is None or not isinstance(ids, Tensor):
        return []
    ids = ids.view(-1, ids.shape[-1])
    last = (ids.argmax(-1) if eos == 2 else (ids == eos).int().argmax(-1)).unsqueeze(-1)
    return [torch.arange(ids.shape[-1], device=ids.device) <= last]
