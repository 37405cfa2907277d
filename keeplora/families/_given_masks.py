"""The masks that the modules of a model of transformers are given, and which layers they are for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from keeplora._messages import warn
from keeplora.lora import LoraSlot, TokenMask

from ._padding import Matched, match, mismatch, nothing_hidden, untold

__all__ = ["owns", "padding_mask"]

_MASKS = ("attention_mask", "pixel_attention_mask", "patch_attention_mask")
_SEQUENCE_FIRST = frozenset(
    ("XLNetModel", "LongformerSelfAttention", "LEDEncoderSelfAttention", "FSMTEncoder", "FSMTDecoder")
)
"""Modules whose layers see ``[tokens, batch, width]``; all others of the library ``[batch, tokens, width]``."""


def owns(model: nn.Module) -> bool:
    """Whether ``model`` is a ``transformers.PreTrainedModel``."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(model).__mro__
    )


@contextmanager
def padding_mask(model: nn.Module, *, pools_at_end: bool = False, sees_padding: bool = False) -> Iterator[TokenMask]:
    """The mask of layers inside ``model``, from what the forwards around them were last given."""
    chains, firsts = _chains(model)
    owners = {id(module): {id(inner) for inner in module.modules()} for module in model.modules() if owns(module)}
    given: dict[int, _Given] = {}
    ordered: dict[int, bool] = {}  # layers of unknown models whose axes were told apart: tokens before samples
    unmasked: list[str] = []

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = _arguments(module, args, kwargs)
        given[id(module)] = here = _given(arguments)
        if not owns(module):
            return
        ids = arguments.get("input_ids")
        if not here.masks and isinstance(ids, Tensor):  # one that a model around it did not hand on
            outer = [given[around].masks for around in owners if around in given and id(module) in owners[around]]
            here.masks = next((m for m in outer if len(m) == 1 and getattr(m[0], "shape", None) == ids.shape), [])
        if pools_at_end:
            here.masks = [*here.masks, *_up_to_end(module, ids)]
        if not here.masks and not sees_padding and not unmasked and _is_padded(module, ids):
            unmasked.append(type(module).__name__)

    def mask(slot: LoraSlot, x: Tensor) -> Tensor | None:
        chain = [given[id(module)] for module in chains.get(id(slot.host), ()) if id(module) in given]
        known = firsts.get(id(slot.host))
        if known is None:  # not the library's own code: as its layers were seen to be
            evident = {ordered.get(id(slot.host))} if x.dim() > 2 else set(ordered.values())
            known = evident.pop() if len(evident) == 1 else None
        told = None
        for asked in chain:
            matched = asked.match(x, known, chain[0].past)
            if matched is None:
                told = told or asked.mismatch(x)
                continue
            if matched.sequence_first is not None:
                ordered[id(slot.host)] = matched.sequence_first
            if asked.masks_of(x):
                return matched.keep
        if told is not None:
            layers.setdefault(slot.name, told)
        return None

    handles = [
        module.register_forward_pre_hook(remember, with_kwargs=True)
        for module in dict.fromkeys(module for chain in chains.values() for module in chain)
    ]
    try:
        with untold() as layers:
            yield mask
    finally:
        for handle in handles:
            handle.remove()
    if unmasked:
        warn(
            f"token_mask: padded texts must come with an attention_mask, got none for the pad tokens that "
            f"{unmasked[0]} was given: they count. Pass attention_mask to the model, or token_mask=."
        )


@dataclass
class _Given:
    """What a forward was given about its tokens, and about those of another stack whose keys and values it reads."""

    masks: list[Any]
    past: int | None
    other: Tensor | None
    other_masks: list[Any]
    matches: dict[Any, Matched | None] = field(default_factory=dict)

    def masks_of(self, x: Tensor) -> list[Any]:
        other = self.other
        is_other = other is not None and (x is other or (x.data_ptr(), x.shape) == (other.data_ptr(), other.shape))
        return self.other_masks if is_other else self.masks

    def match(self, x: Tensor, sequence_first: bool | None, past: int | None) -> Matched | None:
        """:func:`match`, once for all layers whose inputs have the same axes."""
        masks = self.masks_of(x)
        key = (masks is self.other_masks, x.shape[:-1], x.device, sequence_first)
        if key not in self.matches:
            none = Matched(None, None)
            found = match(masks, x, sequence_first, None if masks is self.other_masks else past) if masks else none
            self.matches[key] = found
        return self.matches[key]

    def mismatch(self, x: Tensor) -> str | None:
        masks = self.masks_of(x)
        return None if nothing_hidden(masks) else mismatch(masks, x)


def _given(arguments: Mapping[str, Any]) -> _Given:
    masks = [arguments[name] for name in _MASKS if arguments.get(name) is not None][:1]
    if arguments.get("key_value_states") is not None or "decoder_attention_mask" in arguments:
        masks = []  # of cross-attention, or of an encoder with a decoder beside it: these are asked themselves
    if not masks and arguments.get("input_mask") is not None:  # XLNet's other one: 1 is padding
        masks = [arguments["input_mask"] == 0]
    other, other_mask = arguments.get("encoder_hidden_states"), arguments.get("encoder_attention_mask")
    return _Given(
        masks,
        _past(arguments),
        other if isinstance(other, Tensor) else None,
        [] if other_mask is None else [other_mask],
    )


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
        takes = owns(module) or not {*_MASKS, "input_mask"}.isdisjoint(_names(type(module).forward))
        of[id(module)] = chains[path] = (*chain, module) if takes else chain
        if type(module).__name__ in _SEQUENCE_FIRST:
            firsts[path] = True
        elif owns(module):
            if type(module).__module__.startswith("transformers."):
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


def _is_padded(module: nn.Module, ids: Any) -> bool:
    """Whether a text begins or ends with at least two pad tokens."""
    pad = getattr(getattr(module, "config", None), "pad_token_id", None)
    if not isinstance(pad, int) or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2:
        return False
    padding = ids == pad
    return bool((padding[:, :2].all(1) | padding[:, -2:].all(1)).any())
