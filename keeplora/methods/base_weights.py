"""Which weights an adapter was made for: hashes of their values, the same in every dtype that holds them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from keeplora.lora import LoraSlot
from keeplora.lora.shares import is_dtensor, rows_of
from keeplora.lora.update import Update
from keeplora.math.digest import digest, digest_of_sums

from .shared_sums import converted, sums_everywhere

__all__ = [
    "Hashes", "SlotWeights", "base_fault", "hash_weights", "inner_of_updates", "inner_product", "is_hashes",
]  # fmt: skip

Hashes = dict[str, dict[str, str]]
"""By weight and dtype: of its values in its own dtype, and rounded to each narrower one."""

_NARROWER = {
    torch.float64: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16, torch.float16),
    torch.float16: (torch.float16, torch.bfloat16),
}
_DIGITS = 16


@torch.no_grad()
def hash_weights(weights: Mapping[str, Tensor]) -> Hashes:
    """Hashes by which these weights are known again, also by somebody who has loaded them in a narrower dtype.

    Examples:
        >>> w = {"w": torch.tensor([0.1, 0.25])}
        >>> sorted(hash_weights(w)["w"])
        ['bfloat16', 'float16', 'float32']
        >>> hash_weights(w)["w"]["bfloat16"] == hash_weights({"w": w["w"].bfloat16()})["w"]["bfloat16"]
        True
    """
    hashes: Hashes = {}
    for name, weight in weights.items():
        if is_dtensor(weight):
            return _hash_shares(weights)
        dtypes = _NARROWER.get(weight.dtype, (weight.dtype,))
        hashes[name] = {_named(dtype): _hash(weight, dtype) for dtype in dtypes}
    return hashes


def _hash_shares(weights: Mapping[str, Tensor]) -> Hashes:
    """The same of weights whose rows lie in several processes."""
    jobs = [(n, w, dtype) for n, w in weights.items() for dtype in _NARROWER.get(w.dtype, (w.dtype,))]
    found = sums_everywhere([(converted(rows_of(w), dtype), w.shape) for _, w, dtype in jobs])
    hashes: Hashes = {name: {} for name in weights}
    for (name, weight, dtype), blocks in zip(jobs, found, strict=True):
        hashes[name][_named(dtype)] = digest_of_sums([("", dtype, weight.shape, blocks)])[:_DIGITS]
    return hashes


class SlotWeights(Mapping[str, Tensor]):
    """The whole weights that slots are rows of, by their parameters' names; quantised ones are read when asked for."""

    def __init__(self, slots: Sequence[LoraSlot]):
        self._slots = {f"{slot.target.module}.{slot.target.parameter}".lstrip("."): slot for slot in slots}

    def __getitem__(self, name: str) -> Tensor:
        return self._slots[name].readable(comparable=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


def is_hashes(value: Any) -> bool:
    """Whether ``value`` is of this kind; it may come from anywhere."""
    if not isinstance(value, dict) or not all(isinstance(each, dict) and each for each in value.values()):
        return False
    texts = [text for each in value.values() for text in each.values()]
    return all(isinstance(text, str) and re.fullmatch("[0-9a-f]{16}", text) for text in texts)


def inner_product(weights: Iterable[Tensor], updates: Sequence[Update]) -> float:
    r"""``Σ ⟨W, ΔW⟩`` of low-rank updates of weights, in float64.

    By this an update is found in weights that hold it already, however it was merged and rounded:
    $\langle W + t\,\Delta W, \Delta W \rangle - \langle W, \Delta W \rangle = t\,\lVert \Delta W \rVert^2$.
    """
    total = 0.0
    for weight, update in zip(weights, updates, strict=True):
        wide, a, b = weight.detach().to("cpu", torch.float64), update.a.double(), update.b.double()
        total += update.scaling * float(((b.T @ wide) * a).sum())
    return total


def inner_of_updates(one: Update, other: Update) -> float:
    """``⟨ΔW, ΔW'⟩``, in float64, from the factors."""
    rows, columns = one.a.double() @ other.a.double().T, one.b.double().T @ other.b.double()
    return one.scaling * other.scaling * float((rows * columns).sum())


def base_fault(
    note: Mapping[str, Any],
    whole: Mapping[str, Tensor],
    original: Hashes | None,
    weights: Iterable[Tensor],
    updates: Sequence[Update],
) -> str | None:
    """What is wrong with putting an adapter on these weights; None where it was made for them, or nothing is known.

    Args:
        note: What ``keeplora.json`` tells; it may come from anywhere.
        whole: All weights that are adapted, as they are now, and ``original`` hashes of what they were once.
        weights: Of every slot that the adapter changes, as they are now, and its update.
        updates: Of every slot that the adapter changes, as they are now, and its update.
    """
    known, inner = note.get("weights", {}), note.get("inner_product")
    if not is_hashes(known) or not (inner is None or (type(inner) in (int, float) and math.isfinite(inner))):
        return "a keeplora.json that cannot be read"
    square = sum(inner_of_updates(update, update) for update in updates)
    if inner is not None and square and 0.5 < (inner_product(weights, updates) - inner) / square < 1.5:
        return "weights that hold the adapter's updates already, which would count twice"
    if missing := sorted(set(known) - set(whole)):
        return f"a model without {len(missing)} of its {len(known)} weights (first: {missing[0]})"
    other = [name for name, by_dtype in known.items() if not _is_known(by_dtype, whole[name])]
    if original is not None and all(_agree(known[name], original.get(name, {})) for name in known):
        return None
    return f"other values in {len(other)} of {len(known)} weights (first: {other[0]})" if other else None


def _agree(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    shared = next((dtype for dtype in one if dtype in other), None)
    return shared is not None and one[shared] == other[shared]


def _is_known(by_dtype: Mapping[str, str], weight: Tensor) -> bool:
    """In the weight's own dtype where that was hashed; else rounded as the base was when the adapter was made."""
    own = _named(weight.dtype)
    if own in by_dtype:
        return _hash(weight, weight.dtype) == by_dtype[own]
    wider = next(iter(by_dtype), None)
    return wider in _DTYPES and _hash(weight, _DTYPES[wider]) == by_dtype[wider]


def _hash(weight: Tensor, dtype: torch.dtype) -> str:
    return digest([("", weight.detach().to(dtype))])[:_DIGITS]


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_DTYPES = {_named(dtype): dtype for dtype in _NARROWER}
