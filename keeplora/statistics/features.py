"""Feature statistics: second moments of the adapted layers' inputs over one pass of a task's data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from keeplora._messages import listed, warn
from keeplora.lora.host import LoraHost
from keeplora.lora.slot import LoraSlot, TokenMask
from keeplora.math.finite import first_not_finite
from keeplora.math.moment import SketchedMoment, nystrom
from keeplora.math.sketch import gaussian
from keeplora.ops.gram import energy_of, gram, quick_energy
from keeplora.ops.precision import full_precision

from .passes import ALONE, Peers, counting, evaluating, naming_batch, observing, rows_that_count
from .steps import in_step, steps
from .sums import Sum, add_up, added

__all__ = ["FeatureKind", "FeatureStatistic", "feature_statistics", "require_seen"]

FeatureKind = Literal["second_moment", "slot_mean", "sketch"]
"""What is gathered of a layer's inputs: see [`feature_statistics`][]."""
Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class FeatureStatistic:
    """Second moment ``Σ xᵀx`` of the inputs of a layer over ``tokens`` tokens, and its trace, summed in float64 on its
    own: right also where float32 does not hold the squares.

    ``moment`` is ``[in, in]`` in float32 (float64 for float64 inputs), or a sketch of it. Of a layer that no batch
    reached it is zero, as ``tokens`` are.
    """

    moment: Tensor | SketchedMoment
    tokens: int
    energy: float


@torch.no_grad()
def feature_statistics(
    model: nn.Module,
    slots: Sequence[LoraSlot],
    loader: Iterable[Any],
    forward: Forward,
    *,
    kind: FeatureKind = "second_moment",
    token_mask: TokenMask | None = None,
    sketch_share: float = 0.25,
    seed: int = 0,
    peers: Peers = ALONE,
    some_unseen: bool = False,
) -> list[FeatureStatistic]:
    r"""Second moment of each slot's inputs over one pass of the data, adapters included, without gradients.

    $$ C = \sum_{\text{tokens}} x^\top x \quad [\text{in}, \text{in}] $$

    Slots that read the same tensor one after the other (q, k and v of self-attention, whether one layer or three) share
    one statistic: the same object. Memory: ``4 in²`` bytes per distinct input, whatever the number of tokens, and one
    such matrix more while a batch is added. ``kind="slot_mean"`` averages ``xᵀ`` over batches position by position
    before taking the second moment, as the public code of KeepLoRA does: a position is a sample's place in the batch
    and a token's in the sample, and its mean is over the batches in which it counts. The rank then depends on the
    number of batches, and it takes ``4 tokens in`` bytes of the longest batch. ``kind="sketch"`` keeps ``C Ω`` for a
    random ``Ω [in, w]`` in ``4 in w`` bytes ([`keeplora.math.moment.nystrom`][]): for layers so wide that ``in²`` is
    too much.

    Args:
        forward: ``forward(model, batch)``; its result is not used. A loss function is fine.
        token_mask: Which tokens count (padding should not).
        sketch_share: ``w`` as a fraction of ``in``, in (0, 1]; it must exceed the share of directions to be protected.
        seed: Of Ω.
        peers: The processes among which the data are shared out ([`keeplora.distributed.processes`][]): all get the
            statistics of all data. A process may have no batch.
        some_unseen: Whether it is fine that no token counts in any of these layers, since there are others
            (``require_seen``).

    Raises:
        ValueError: the loader is empty, or no token counted in any of the layers; an input is NaN or Inf, or its width
            changes (the layer and the batch are named); inputs are so large that float32 does not hold their squares
            (the layer is named); ``kind`` or ``sketch_share`` is out of range; with "slot_mean" samples have other
            numbers of tokens in some batches, so that positions mean nothing.

    Warns:
        UserWarning: inputs are so small that float32 does not hold their squares; the layers are named.
    """
    if kind not in ("second_moment", "slot_mean", "sketch"):
        raise ValueError(f"feature_statistics: kind must be 'second_moment', 'slot_mean' or 'sketch', got {kind!r}")
    if not 0 < sketch_share <= 1:
        raise ValueError(f"feature_statistics: sketch_share must lie in (0, 1], got {sketch_share}")
    collector, batches = _Collector(slots, kind, token_mask, sketch_share, seed), 0
    with peers.together(), evaluating(model), observing(list(collector.by_host), collector.observe):
        for batch, counts in steps(model, loader, peers):
            with in_step(model, peers), naming_batch("feature_statistics", batches, batch):
                forward(model, batch)
            collector.end_batch(batches)
            batches += counts
    batches = sum(peers.gather(batches))
    if batches == 0:
        raise ValueError(
            "feature_statistics: loader must yield at least one batch, got none. "
            "A generator can be used once: pass a loader that can be iterated again."
        )
    collector.add_up(peers)
    result = collector.result()
    if not some_unseen:
        require_seen(slots, result)
    return result


def require_seen(slots: Sequence[LoraSlot], statistics: Iterable[FeatureStatistic]) -> None:
    """Refuse statistics of no token at all.

    Raises:
        ValueError: no token counted in any of the layers.
    """
    if not any(statistic.tokens for statistic in statistics):
        raise ValueError(
            f"feature_statistics: an adapted layer must see a token that counts, got none in all {len(slots)} "
            f"[first: {slots[0].name}]. Check that the forward function runs their towers and that the mask keeps "
            "tokens."
        )


@dataclass
class _Input:
    """A tensor that layers were given, and what it adds to a sum."""

    x: Tensor
    version: int  # counts changes in place
    part: Tensor
    counts: Tensor | None
    tokens: int | Tensor  # a number that only the device knows, or one that is known
    energy: Tensor
    slots: set[LoraSlot]

    def is_same(self, x: Tensor, slot: LoraSlot) -> bool:
        """Whether ``slot`` reads it too: the same tensor, unchanged, in a layer that has not read it yet."""
        return x is self.x and _version(x) == self.version and slot not in self.slots


class _Collector:
    """Accumulates one statistic per distinct input: a set of slots, of any layers, that were given one tensor.

    Layers that share an input are called one after the other, so the slots of the last tensor are collected until
    another one comes; then its moment joins that of the same set of slots.
    """

    def __init__(
        self, slots: Sequence[LoraSlot], kind: FeatureKind, token_mask: TokenMask | None, share: float, seed: int
    ):
        self.slots, self.kind, self.token_mask = slots, kind, token_mask
        self.share, self.seed = share, seed
        self.by_host: dict[LoraHost, dict[str, LoraSlot]] = {}
        for slot in slots:
            self.by_host.setdefault(slot.host, {})[slot.slot] = slot
        self.sums: dict[frozenset[LoraSlot], Sum] = {}
        self.last: _Input | None = None
        self.ordinary: set[LoraSlot] = set()  # those whose inputs float32 is known to hold the squares of
        self.small: dict[str, float] = {}  # root mean squares of inputs that it does not, by their first layers
        self.shapes: dict[LoraSlot, tuple[int, ...]] = {}  # of a sample's tokens, for slot_mean
        # Energies and numbers of tokens that are still on their way.
        self.batch: list[tuple[Sum, frozenset[LoraSlot], Tensor, int | Tensor]] = []

    @torch.inference_mode(False)  # sums made in inference mode could not be added to outside it
    @torch.no_grad()
    def observe(self, host: LoraHost, inputs: Mapping[str, Tensor]) -> None:
        for name, x in inputs.items():
            if name not in self.by_host[host]:
                continue
            slot = self.by_host[host][name]
            if self.last is None or not self.last.is_same(x, slot):
                self.flush()
                mask = counting("feature_statistics", self.token_mask, slot, x)
                rows, tokens = rows_that_count(x, mask, in_place=self.kind == "slot_mean")
                if rows.shape[1] != slot.weight.shape[1]:
                    raise ValueError(
                        f"feature_statistics: features must have the layer's {slot.weight.shape[1]} columns, got "
                        f"{rows.shape[1]} [{slot.name}]"
                    )
                with full_precision(rows.device):
                    part, energy = self.part(rows)
                    if slot not in self.ordinary and not _looked_at(rows):
                        energy = energy_of(rows)
                counts = self.positions(slot, x, part, mask) if self.kind == "slot_mean" else None
                self.last = _Input(x, _version(x), part, counts, tokens, energy, set())
            self.last.slots.add(slot)

    def part(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """This call's share of the sum: ``xᵀx``, ``xᵀ(x Ω)``, or x itself for the mean of positions; and ‖x‖²."""
        if self.kind == "second_moment":
            return gram(rows)
        wide = rows.to(_wide(rows), copy=True)
        energy = quick_energy(wide)
        return (wide if self.kind == "slot_mean" else wide.T @ (wide @ self.omega(wide))), energy

    def positions(self, slot: LoraSlot, x: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Which rows count, ``[rows, 1]``: each is at its position in the batch."""
        shape = tuple(x.shape[1:-1])
        known = self.shapes.setdefault(slot, shape)
        if shape != known:
            raise ValueError(
                f"feature_statistics: with slot_mean every sample must have as many tokens as those before, got "
                f"{list(shape)} after {list(known)} [{slot.name}]. Pad all batches to one length, or use "
                'feature_statistic="second_moment".'
            )
        return rows.new_ones(len(rows), 1) if mask is None else mask.reshape(-1, 1).to(rows.dtype)

    def omega(self, like: Tensor) -> Tensor:
        d = like.shape[1]
        return gaussian(d, max(1, round(self.share * d)), self.seed, like)

    def names(self, slots: frozenset[LoraSlot]) -> list[str]:
        """Of these, in the order of the targets."""
        return [slot.name for slot in self.slots if slot in slots]

    def flush(self) -> None:
        """Add what the last input gave to the sum of the slots that were given it."""
        if self.last is None:
            return
        slots, part = frozenset(self.last.slots), self.last.part
        total = self.sums.get(slots)
        if total is None:
            total = self.sums[slots] = Sum(part, self.last.counts)
        else:
            total.part = added(total.part, part)
            if total.counts is not None and self.last.counts is not None:
                total.counts = added(total.counts, self.last.counts)
        self.batch.append((total, slots, self.last.energy, self.last.tokens))
        self.last = None

    def end_batch(self, index: int) -> None:
        """Bring the batch's energies and numbers of tokens over, in one transfer, and refuse what is not finite."""
        self.flush()
        if not self.batch:
            return
        device = self.batch[0][2].device
        waiting = [t.to(device, torch.float64) for _, _, *sent in self.batch for t in sent if isinstance(t, Tensor)]
        arrived = iter(torch.stack(waiting).tolist())
        for total, slots, *sent in self.batch:
            energy, tokens = (next(arrived) if isinstance(t, Tensor) else t for t in sent)
            if not math.isfinite(energy):
                raise ValueError(
                    f"feature_statistics: features must be finite, got NaN or Inf in batch {index} "
                    f"[{self.names(slots)[0]}]"
                )
            total.energy += energy
            total.tokens += int(tokens)
            if total.energy > _LEAST * total.rows() * next(iter(slots)).weight.shape[1]:
                self.ordinary |= slots
        self.batch.clear()

    def add_up(self, peers: Peers) -> None:
        """Sums over all processes, by the names of the slots that share one: elsewhere others may have come first, or
        shared an input that was separate here."""
        own = {tuple(sorted(slot.name for slot in slots)): total for slots, total in self.sums.items()}
        shapes = {slot.name: shape for slot, shape in self.shapes.items()}
        self.sums.clear()
        by_name = {slot.name: slot for slot in self.slots}
        everyone = add_up(own, shapes, by_name, self.kind == "slot_mean", peers)
        self.sums = {frozenset(by_name[name] for name in names): total for names, total in everyone.items()}

    def result(self) -> list[FeatureStatistic]:
        for total in self.sums.values():
            if total.counts is not None:
                mean = total.part / total.counts.clamp_min(1)
                with full_precision(mean):
                    total.part, total.energy, total.means = mean.T @ mean, float(energy_of(mean)), len(mean)
        pooled: dict[Any, FeatureStatistic] = {}
        result = []
        for slot in self.slots:
            mine = frozenset(key for key, total in self.sums.items() if slot in key and total.tokens)
            kind = mine or (slot.weight.shape[1], slot.weight.dtype, slot.weight.device)
            if kind not in pooled:
                sums = [total for key, total in self.sums.items() if key in mine]
                pooled[kind] = self.pool(sums, slot) if sums else self.nothing(slot)
            result.append(pooled[kind])
        self.warn_of_small()
        return result

    def warn_of_small(self) -> None:
        if self.small:
            worst = min(self.small, key=self.small.__getitem__)
            warn(
                f"feature_statistics: features must have squares that float32 holds, got {self.small[worst]:.1e} in "
                f"the root mean square [{worst}]: {len(self.small)} of the second moments miss some or all of what "
                f"came to their layers, which is not protected: {listed(list(self.small))}. Normalise the layers' "
                "inputs, or run the model in float64."
            )

    def nothing(self, slot: LoraSlot) -> FeatureStatistic:
        """What is known of a layer that no token reached."""
        width, dtype = slot.weight.shape[1], _wide(slot.weight)
        if self.kind == "sketch":
            return FeatureStatistic(SketchedMoment(slot.zeros(width, 0, dtype=torch.float64), 0.0), 0, 0.0)
        return FeatureStatistic(slot.zeros(width, width, dtype=dtype), 0, 0.0)

    def pool(self, sums: Sequence[Sum], slot: LoraSlot) -> FeatureStatistic:
        """One statistic of several sums: inputs may be shared at one time and separate at another. Squares that became
        infinite are refused, those that vanished noted."""
        part = sums[0].part
        for other in sums[1:]:
            part = part + other.part
        energy = sum(total.energy for total in sums)
        size = (energy / sum(total.rows() for total in sums) / slot.weight.shape[1]) ** 0.5
        if energy > _MOST and first_not_finite([part]) is not None:
            raise ValueError(
                f"feature_statistics: features must have squares that {part.dtype} holds, got {size:.1e} in the root "
                f"mean square [{slot.name}]. Normalise the layer's inputs, or run the model in float64."
            )
        if 0 < size < _LEAST**0.5 and part.dtype == torch.float32:
            self.small[slot.name] = size
        moment = nystrom(part, self.omega(part.T), energy) if self.kind == "sketch" else part
        return FeatureStatistic(moment, sum(total.tokens for total in sums), energy)


# Of the mean square of float32 numbers: below, some of the squares are denormal, which not all hardware keeps.
_LEAST = 2.0**-116
# Of a sum of squares: from here on an entry of a moment, or of a sketch of it, may be infinite.
_MOST = 2.0**118


def _looked_at(rows: Tensor) -> bool:
    """Whether ``quick_energy`` has seen for itself that float32 holds the squares."""
    return rows.device.type == "cpu"


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # inference tensors do not count
