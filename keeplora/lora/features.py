"""Feature statistics: the second moment of the adapted layers' inputs over one pass of a task's data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from keeplora.math.precision import full_precision
from keeplora.ops.gram import gram

from .adapter import LoraHost
from .passes import evaluating, observing
from .wrap import LoraSlot

__all__ = ["FeatureStatistic", "TokenMask", "feature_statistics"]

Forward = Callable[[nn.Module, Any], Any]
TokenMask = Callable[[LoraSlot, Tensor], Tensor | None]
"""``mask(slot, x) -> bool [x.shape[:-1]]``, True where a token counts; None where all do."""


@dataclass(frozen=True)
class FeatureStatistic:
    """Second moment of the inputs of a layer: ``moment = Σ xᵀx [in, in]`` over ``tokens`` tokens.

    float32; float64 for float64 inputs.
    """

    moment: Tensor
    tokens: int


@torch.no_grad()
def feature_statistics(
    model: nn.Module,
    slots: Sequence[LoraSlot],
    loader: Iterable[Any],
    forward: Forward,
    *,
    kind: Literal["second_moment", "slot_mean"] = "second_moment",
    token_mask: TokenMask | None = None,
) -> list[FeatureStatistic]:
    r"""Second moment of each slot's inputs over one pass of the data, adapters included, without gradients.

    .. math:: C = \sum_{\text{tokens}} x^\top x \quad [\text{in}, \text{in}]

    Slots that read the same tensor one after the other (q, k and v of self-attention, whether one layer or three) share
    one statistic: the same object.
    ``kind="slot_mean"`` averages ``xᵀ`` over batches position by position before taking the second moment, as the
    public code of KeepLoRA does; its rank then depends on the number of batches.

    Args:
        forward: ``forward(model, batch)``; its result is not used. A loss function is fine.
        token_mask: Which tokens count (padding should not).

    Raises:
        ValueError: the loader is empty or no token counted; an input is NaN or Inf, or its width changes
            (the layer and the batch are named).
    """
    if kind not in ("second_moment", "slot_mean"):
        raise ValueError(f"feature_statistics: kind must be 'second_moment' or 'slot_mean', got {kind!r}")
    collector = _Collector(slots, kind, token_mask)
    batches = 0
    with evaluating(model), observing(list(collector.by_host), collector.observe):
        for index, batch in enumerate(loader):
            collector.batch = index
            forward(model, batch)
            collector.flush()
            batches += 1
    if batches == 0:
        raise ValueError(
            "feature_statistics: loader must yield at least one batch, got none. "
            "A generator can be used once: pass a loader that can be iterated again."
        )
    return collector.result()


@dataclass
class _Input:
    """A tensor that layers were given, and what it adds to a sum."""

    x: Tensor
    version: int  # counts changes in place
    part: Tensor
    tokens: int
    slots: set[LoraSlot]

    def is_same(self, x: Tensor, slot: LoraSlot) -> bool:
        """Whether ``slot`` reads it too: the same tensor, unchanged, in a layer that has not read it yet."""
        return x is self.x and _version(x) == self.version and slot not in self.slots


class _Collector:
    """Accumulates one statistic per distinct input: a set of slots, of any layers, that were given one tensor.

    Layers that share an input are called one after the other, so the slots of the last tensor are collected until
    another one comes; then its moment joins that of the same set of slots.
    """

    def __init__(self, slots: Sequence[LoraSlot], kind: str, token_mask: TokenMask | None):
        self.slots, self.kind, self.token_mask = slots, kind, token_mask
        self.by_host: dict[LoraHost, dict[str, LoraSlot]] = {}
        for slot in slots:
            self.by_host.setdefault(slot.host, {})[slot.slot] = slot
        self.sums: dict[frozenset[LoraSlot], Tensor] = {}
        self.counts: dict[frozenset[LoraSlot], int] = {}
        self.batch = 0
        self.last: _Input | None = None

    @torch.inference_mode(False)  # sums made in inference mode could not be added to outside it
    @torch.no_grad()
    def observe(self, host: LoraHost, inputs: Mapping[str, Tensor]) -> None:
        for name, x in inputs.items():
            if name not in self.by_host[host]:
                continue
            slot = self.by_host[host][name]
            if self.last is None or not self.last.is_same(x, slot):
                self.flush()
                mask = None if self.token_mask is None else self.token_mask(slot, x)
                rows = x.detach().flatten(0, -2) if mask is None else x.detach()[mask]
                self.check(rows, slot)
                self.last = _Input(x, _version(x), self.part(rows), rows.shape[0], set())
            self.last.slots.add(slot)

    def check(self, rows: Tensor, slot: LoraSlot) -> None:
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"feature_statistics: features must be finite, got NaN or Inf in batch {self.batch} [{slot.name}]"
            )
        if rows.shape[1] != slot.weight.shape[1]:
            raise ValueError(
                f"feature_statistics: features must have the layer's {slot.weight.shape[1]} columns, got "
                f"{rows.shape[1]} in batch {self.batch} [{slot.name}]"
            )

    def part(self, rows: Tensor) -> Tensor:
        """This call's share of the sum: ``xᵀx``, or x itself for the mean of positions."""
        if self.kind == "slot_mean":
            return rows.to(torch.float32, copy=True)
        with full_precision(rows.device):
            return gram(rows)[0]

    def flush(self) -> None:
        """Add what the last input gave to the sum of the slots that were given it."""
        if self.last is None:
            return
        key, part = frozenset(self.last.slots), self.last.part
        self.counts[key] = self.counts.get(key, 0) + self.last.tokens
        total = self.sums.setdefault(key, part)
        if total is not part:
            if len(part) > len(total):  # positions that no batch had so far
                total, part = part, total
                self.sums[key] = total
            total[: len(part)] += part
        self.last = None

    def result(self) -> list[FeatureStatistic]:
        finished: dict[frozenset[LoraSlot], FeatureStatistic] = {}
        for key, moment in self.sums.items():
            if self.kind == "slot_mean":
                mean = moment / (self.batch + 1)
                moment = mean.T @ mean
            finished[key] = FeatureStatistic(moment, self.counts[key])
        result = []
        for slot in self.slots:
            parts = [statistic for key, statistic in finished.items() if slot in key and statistic.tokens]
            if not parts:
                raise ValueError(
                    f"feature_statistics: every adapted layer must see a token, got none [{slot.name}]. "
                    "Check that the forward function runs this tower and that the mask keeps tokens."
                )
            if len(parts) > 1:  # called with shared inputs at one time, with separate ones at another
                parts = [
                    FeatureStatistic(sum((p.moment for p in parts[1:]), parts[0].moment), sum(p.tokens for p in parts))
                ]
            result.append(parts[0])
        return result


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # inference tensors do not count
