"""Which tokens of a layer's input count, from masks in any form: matched by their axes, told where that fails."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from keeplora._messages import listed, warn

__all__ = ["Matched", "match", "mismatch", "nothing_hidden", "untold"]

HIDDEN = -9e3
"""What is added to scores is a mask where it is below: 16-bit minima, -inf, and the -10000 of older models."""


class Matched(NamedTuple):
    """What came of a match."""

    keep: Tensor | None
    """``bool [x.shape[:-1]]``, True where a token counts; None where all do."""
    sequence_first: bool | None
    """Whether x is ``[tokens, batch, …]``; None where its axes do not say."""


def match(masks: Sequence[Any], x: Tensor, sequence_first: bool | None, past: int | None = None) -> Matched | None:
    """The tokens of ``x [..., in]`` that count in all of ``masks``; None where they cannot be told.

    The axes of x are ``[batch, tokens]`` or ``[tokens, batch]``, with more behind them or not, ``[batch · tokens]``, or
    ``[batch, height, width]``; or x holds the rows that count and no other.

    Args:
        masks: Each ``[batch, tokens]``, ``[batch, height, width]``, ``[batch, heads, queries, keys]`` (with 1 for an
            axis all share, and without heads), a ``BlockMask``, or a mapping to such.
        sequence_first: What is known of x where its axes do not say: where batch and tokens are as many, or one axis.
        past: Tokens in the cache, before those of x; None without a cache.
    """
    axes = tuple(x.shape[:-1])
    if not axes:  # a single vector
        return None
    for batch, tokens, order in _readings(axes, _batch_of(masks)):
        parts = [_counting(mask, batch, tokens, past) for mask in masks]
        fitting = [part.to(x.device) for part in parts if part is not None]
        if len(fitting) < len(parts):
            continue
        keep = torch.stack(fitting).all(0)
        evident = {"batch": False, "sequence": True}.get(order)
        if bool(keep.all()):
            return Matched(None, evident)
        if order in ("flat", "square"):
            same = torch.equal(keep.T.flatten(), keep.flatten())
            if sequence_first is None and not same:
                return None
        if evident or (order in ("flat", "square") and sequence_first):
            keep = keep.T
        if order in ("flat", "grid"):
            return Matched(keep.reshape(axes), evident)
        return Matched(keep.reshape(*keep.shape, *(1 for _ in axes[2:])).expand(axes), evident)
    if len(masks) == 1 and _is_of_tokens(masks[0]) and list(axes) in ([x.shape[-2]], [1, x.shape[-2]]):
        real = int(_truth(masks[0]).sum())
        return Matched(None, None) if real == x.shape[-2] else None  # a layer that is given what is not padding
    return None


def _batch_of(masks: Sequence[Any]) -> int | None:
    """How many samples there are; None where a mask is shared by all of them."""
    for mask in masks:
        first = next(iter(mask.values()), None) if isinstance(mask, Mapping) else mask
        shape: Sequence[int] = getattr(first, "shape", ())
        if len(shape) == 2 or (len(shape) > 2 and shape[0] > 1):
            return int(shape[0])
    return None


def _readings(axes: Sequence[int], batch: int | None) -> Iterator[tuple[int, int, str]]:
    """What the axes of x may be: numbers of samples and of tokens, and how they stand."""
    if len(axes) == 1 or (len(axes) == 2 and axes[0] == 1 and batch is not None):
        count, samples = math.prod(axes), batch or 1
        if count % samples == 0:
            yield samples, count // samples, "flat"
        return
    first, second = axes[:2]
    samples = first if batch is None else batch
    if samples == first == second:
        yield samples, samples, "square"
    elif samples == first:
        yield samples, second, "batch"
    elif samples == second:
        yield samples, first, "sequence"
    if len(axes) == 3 and samples == first:
        yield samples, second * axes[2], "grid"


def _counting(mask: Any, batch: int, tokens: int, past: int | None) -> Tensor | None:
    """``bool [batch, tokens]`` of one mask; None where it has other axes."""
    if isinstance(mask, Mapping):  # one prepared mask for each kind of attention
        kinds = sorted(mask, key=lambda kind: kind != "full_attention")
        fitting = (_counting(mask[kind], batch, tokens, past) for kind in kinds)
        return next((keep for keep in fitting if keep is not None), None)
    if hasattr(mask, "mask_mod"):
        mask = _dense(mask)
    if not isinstance(mask, Tensor) or not 2 <= mask.dim() <= 4:
        return None
    if mask.dim() == 2:
        seen: Tensor | None = _truth(mask)
    elif mask.dim() == 3 and mask.shape[1] not in (1, tokens) and mask.shape[1] * mask.shape[2] == tokens:
        seen = _truth(mask).flatten(1)
    else:
        visible = _truth(mask if mask.dim() == 3 else mask.flatten(1, -3))
        visible = visible if mask.dim() == 3 else visible.any(1)
        if visible.shape[1] == 1 != tokens:
            seen = visible[:, 0]
        else:
            seen = _connected(visible, past or 0) if _own(visible, tokens, past) else None
    if seen is None:
        return None
    if seen.shape[1] != tokens:  # the rest is in the cache, or a place in it that is empty yet
        if past is None or seen.shape[1] < past + tokens:
            return None
        seen = seen[:, past : past + tokens]
    return seen.expand(batch, tokens) if seen.shape[0] in (1, batch) else None


def nothing_hidden(masks: Sequence[Any]) -> bool:
    """Whether all of ``masks`` are of tokens, and keep every one."""
    return all(_is_of_tokens(mask) and bool(_truth(mask).all()) for mask in masks)


def _is_of_tokens(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _truth(mask: Tensor) -> Tensor:
    """Where a mask lets through: one that is added to scores is 0 there, others are not."""
    added = mask.is_floating_point() and (mask.dim() > 2 or bool((mask < 0).any()) or not bool(mask.any()))
    return mask > HIDDEN if added else mask != 0


def _own(visible: Tensor, tokens: int, past: int | None) -> bool:
    """Whether the queries are the tokens, and their own keys are known."""
    keys = visible.shape[2]
    return visible.shape[1] == tokens and (keys == tokens if past is None else keys >= past + tokens)


def _connected(visible: Tensor, past: int, *, inverted: bool = False) -> Tensor | None:
    """``[batch, tokens]`` of ``bool [batch, queries, keys]``: a token counts that sees another or is seen by one.

    Padding sees only itself or nothing, and is seen by no token that counts. Rows that would see nothing see
    everything in some libraries. None where padding has the marks of a token.
    """
    tokens = visible.shape[1]
    own = visible[:, :, past : past + tokens]
    everything = visible.all(2)
    unmasked = everything & ~everything.all(1, keepdim=True)
    unmasked[:, -1] = False  # the last token of a causal model does see everything
    others = own & ~unmasked.unsqueeze(2) & ~torch.eye(tokens, dtype=torch.bool, device=own.device)
    itself, seen = own.diagonal(dim1=1, dim2=2) & ~unmasked, others.any(1)
    if bool((seen & ~own.diagonal(dim1=1, dim2=2)).any()):  # hidden from itself alone: perhaps True means hidden
        return None if inverted else _connected(~visible, past, inverted=True)
    last = itself & ~seen & (visible.sum(2) > 1)  # the last of a text sees what is before it
    before = torch.zeros_like(last)
    before[:, 1:] = own.diagonal(-1, 1, 2)
    if past:
        before[:, 0] = visible[:, 0, past - 1]
    counts = seen | last
    single = itself & ~counts.any(1, keepdim=True)
    if bool((last & ~before).any()) or bool((single.sum(1) > 1).any()):
        return None
    return counts | single


def _dense(mask: Any) -> Tensor:
    """flex attention's block mask, as ``bool [batch, heads, queries, keys]``."""
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = mask.kv_num_blocks.shape[:2]
    queries, keys = mask.seq_lengths
    return create_mask(mask.mask_mod, batch, heads, queries, keys, device=mask.kv_num_blocks.device)


_TOLD: WeakKeyDictionary[nn.Module, set[tuple[str, str]]] = WeakKeyDictionary()
"""By model, what the user has been told of which layers."""


@dataclass
class Untold:
    """Layers all of whose tokens count although some are padding, each with the reason."""

    mismatched: dict[str, str] = field(default_factory=dict)
    """What their masks and inputs are."""
    unmasked: dict[str, str] = field(default_factory=dict)
    """Which module was given padding without a mask."""


@contextmanager
def untold(model: nn.Module) -> Iterator[Untold]:
    """A list of layers of ``model`` whose tokens could not be told; the user is told of each once, when the first pass
    that sees it ends."""
    layers, told = Untold(), _TOLD.setdefault(model, set())
    yield layers
    for reasons, text in ((layers.mismatched, _MISMATCHED), (layers.unmasked, _UNMASKED)):
        names = [name for name in reasons if (text, name) not in told]
        if names:
            warn(f"token_mask: {text.format(reasons[names[0]], listed(names))} {_REMEDY}")
        told.update((text, name) for name in names)


_MISMATCHED = "a mask must have the axes of a layer's tokens, got {} [{}]: all of their tokens count, padding too. Pass"
_UNMASKED = (
    "padded texts must come with an attention_mask, got none for the pad tokens that {} was given [{}]: they count. "
    "Pass attention_mask to the model (decoder_attention_mask for a decoder's), or"
)
_REMEDY = (
    "token_mask=, a function of a slot and its input x that returns a bool tensor of shape x.shape[:-1], True where a "
    "token counts."
)


def mismatch(masks: Sequence[Any], x: Tensor) -> str:
    """What was given for which input."""
    shapes = [list(mask.shape) if hasattr(mask, "shape") else type(mask).__name__ for mask in masks]
    return f"{' and '.join(map(str, shapes))} for an input of {list(x.shape)}"
