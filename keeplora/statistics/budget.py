"""How much memory the statistics of a pass may take, and which layers are looked at together to stay within it."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from keeplora._messages import warn
from keeplora.lora.host import LoraHost
from keeplora.lora.slot import LoraSlot
from keeplora.math.factorise import plan_for

from .features import FeatureKind
from .passes import ALONE, Peers, evaluating, observing
from .steps import in_step, steps

__all__ = ["budget_of", "feature_groups", "mib"]

FREE_SHARE = 0.2
"""Of the free memory, where no budget is given."""

COPIES = 10
"""Of a statistic, that the decompositions of a layer hold at once: four of them in float64."""

log = logging.getLogger("keeplora")


def budget_of(memory_budget: int | None, slots: Sequence[LoraSlot]) -> int:
    """Bytes for all statistics together: ``memory_budget``, or if None 20 % of what is free before the first of the
    weights' devices is full."""
    if memory_budget is not None:
        return memory_budget
    on: dict[torch.device, int] = {}
    for slot in slots:
        on[slot.weight.device] = on.get(slot.weight.device, 0) + slot.weight.numel()
    whole = sum(on.values())
    return int(FREE_SHARE * min(free_bytes(device) * whole / max(1, share) for device, share in on.items()))


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def feature_groups(
    model: nn.Module,
    slots: Sequence[LoraSlot],
    loader: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    *,
    function: str = "after_task",
    kind: FeatureKind = "second_moment",
    sketch_share: float = 0.25,
    memory_budget: int | None = None,
    whole_spectra: bool = False,
    remedy: str = "Raise the budget.",
    peers: Peers = ALONE,
) -> list[list[int]]:
    """Positions of slots whose feature statistics fit ``memory_budget`` together: one pass over the data for each.

    A statistic takes ``4 in²`` bytes, a sketch of it ``4 in w``. Beside all of them there must be room for what one
    layer takes: as many bytes for a batch that is being added, and ten times as many where a basis is found by
    eigendecomposition. Where not all fit, one batch is run to see which slots read one tensor: they have one statistic
    and stay together. Statistics of ``slot_mean``, which grow with the batch, are gathered in one pass.

    Args:
        function: What the user called.
        whole_spectra: Whether eigendecompositions of whole statistics are made, however wide they are.
        remedy: What to do where a single layer does not fit.

    Returns:
        One group where all fit. What was chosen is logged by ``keeplora`` at level INFO.

    Warns:
        UserWarning: the statistic of a single layer does not fit, or the loader can be iterated only once.
    """
    everything = [list(range(len(slots)))]
    if kind == "slot_mean" or not slots:
        return everything
    budget = min(peers.gather(budget_of(memory_budget, slots)))
    sizes = [_bytes(slot.weight, sketch_share if kind == "sketch" else 1.0) for slot in slots]
    work = [
        size * COPIES if whole_spectra else _work(slot.weight, size) for slot, size in zip(slots, sizes, strict=True)
    ]
    if sum(sizes) + max(work) <= budget:
        return everything
    if any(peers.gather(isinstance(loader, Iterator))):
        warn(
            f"{function}: statistics of {mib(sum(sizes))} must fit memory_budget, {mib(budget)}, or be gathered "
            "in several passes, got a loader that can be iterated once. They are gathered in one pass. Give a "
            "DataLoader or a list."
        )
        return everything
    groups = _within(_sharing(model, slots, loader, forward, peers), sizes, work, budget)
    alone = [size + more for size, more in zip(sizes, work, strict=True)]
    if max(alone) > budget:
        warn(
            f"{function}: what one layer takes must fit memory_budget, {mib(budget)}, got {mib(max(alone))} "
            f"[{slots[alone.index(max(alone))].name}]. It is looked at all the same, alone. {remedy}"
        )
    log.info(
        "features of %d layers in %d passes over the data: %s of statistics together, memory_budget %s",
        len(slots), len(groups), mib(sum(sizes)), mib(budget),
    )  # fmt: skip
    return groups


def _within(shared: Sequence[Sequence[int]], sizes: Sequence[int], work: Sequence[int], budget: int) -> list[list[int]]:
    """Sets of slots with one statistic each, in groups that fit."""
    groups: list[list[int]] = []
    held, most = 0, 0
    for members in shared:
        size, more = sizes[members[0]], work[members[0]]
        if not groups or held + size + max(most, more) > budget:
            groups.append([])
            held, most = 0, 0
        groups[-1] += members
        held, most = held + size, max(most, more)
    return [sorted(group) for group in groups]


def _work(weight: Tensor, size: int) -> int:
    """What a layer takes besides its statistic: subspace iteration needs one more copy, LAPACK ten."""
    return size * (2 if weight.shape[1] >= plan_for(weight.device.type).iterative_from else COPIES)


def _bytes(weight: Tensor, share: float) -> int:
    width = weight.shape[1]
    return (8 if weight.dtype == torch.float64 else 4) * width * max(1, round(share * width))


def _sharing(
    model: nn.Module,
    slots: Sequence[LoraSlot],
    loader: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    peers: Peers,
) -> list[list[int]]:
    """Which slots read one tensor in the first batch, in order; every other slot is alone."""
    known = {(slot.host, slot.slot): i for i, slot in enumerate(slots)}
    sets: list[list[int]] = []
    last: list[Any] = [None]

    def look(host: LoraHost, inputs: Mapping[str, Tensor]) -> None:
        for name, x in inputs.items():
            i = known.get((host, name))
            if i is None:
                continue
            if x is not last[0]:
                last[0] = x
                sets.append([])
            sets[-1].append(i)

    with peers.together(), evaluating(model), observing([*{slot.host: None for slot in slots}], look):
        for batch, _ in steps(model, itertools.islice(loader, 1), peers):
            with in_step(model, peers):
                forward(model, batch)
        last[0] = None
    found = next((theirs for theirs in peers.gather(sets) if theirs), [])
    seen: set[int] = set()
    result = []
    for members in found:
        mine = [i for i in dict.fromkeys(members) if i not in seen]
        seen |= set(mine)
        if mine:
            result.append(mine)
    return sorted([*result, *([i] for i in range(len(slots)) if i not in seen)], key=lambda group: group[0])


def mib(size: float) -> str:
    """For messages."""
    return f"{size / 2**20:.1f} MiB"
