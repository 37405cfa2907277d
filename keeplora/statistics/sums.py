"""Sums that layers share, and how processes add theirs up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keeplora.lora.slot import LoraSlot

from .passes import Peers

__all__ = ["Sum", "add_up", "added"]

Names = tuple[str, ...]


@dataclass
class Sum:
    """What the inputs of one set of slots have added up to; ``counts [rows, 1]`` are of ``slot_mean``, whose energy is
    that of the ``means`` in the end."""

    part: Tensor
    counts: Tensor | None
    tokens: int = 0
    energy: float = 0.0
    means: int = 0

    def rows(self) -> int:
        """How many of them ``energy`` is of."""
        return self.means or self.tokens


@dataclass(frozen=True)
class _Described:
    """A sum without its numbers: what processes tell each other before they add theirs up."""

    kind: tuple[int, torch.dtype, tuple[int, ...] | None]  # columns, dtype, tokens of a sample: the same everywhere
    rows: int
    tokens: int
    energy: float


def added(total: Tensor, part: Tensor) -> Tensor:
    """Their sum; the shorter one has zeros where it ends. The longer one is written into."""
    longer, shorter = (part, total) if len(part) > len(total) else (total, part)
    longer[: len(shorter)] += shorter
    return longer


def add_up(
    own: dict[Names, Sum],
    shapes: Mapping[str, tuple[int, ...]],
    slots: Mapping[str, LoraSlot],
    counting: bool,
    peers: Peers,
) -> dict[Names, Sum]:
    """The sums of all processes. ``own`` is emptied on the way; ``shapes`` are the tokens of a sample, by layer.

    Raises:
        ValueError: the processes gather different statistics; nothing is added up.
    """
    seen = {names: next((shapes[name] for name in names if name in shapes), None) for names in own}
    everyone = peers.gather({names: _described(total, seen[names]) for names, total in own.items()})
    if len(everyone) == 1:
        return own
    alike = {
        names: [described[names] for described in everyone if names in described]
        for names in sorted(set().union(*everyone))
    }
    for names, theirs in alike.items():
        if any(names[0] not in slots or sent.kind != theirs[0].kind for sent in theirs):
            raise ValueError(
                f"feature_statistics: every process must gather the same statistics, got "
                f"{' and '.join(sorted({str(sent.kind) for sent in theirs}))} [{names[0]}]. Give all processes "
                "the same model and settings."
            )
    with peers.in_step():
        return {
            names: _of_all(theirs, own.pop(names, None), slots[names[0]], counting, peers)
            for names, theirs in alike.items()
        }


def _described(total: Sum, shape: tuple[int, ...] | None) -> _Described:
    return _Described((total.part.shape[1], total.part.dtype, shape), len(total.part), total.tokens, total.energy)


def _of_all(theirs: Sequence[_Described], mine: Sum | None, slot: LoraSlot, counting: bool, peers: Peers) -> Sum:
    rows = max(sent.rows for sent in theirs)  # of slot_mean: as many as the longest batch of any process
    width, dtype, _ = theirs[0].kind
    part = slot.zeros(rows, width, dtype=dtype)
    counts = part.new_zeros(rows, 1) if counting else None
    if mine is not None:
        part[: len(mine.part)] = mine.part
        if counts is not None and mine.counts is not None:
            counts[: len(mine.counts)] = mine.counts
        del mine
    peers.add(part)
    if counts is not None:
        peers.add(counts)
    return Sum(part, counts, sum(sent.tokens for sent in theirs), sum(sent.energy for sent in theirs))
