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

    Slots that read the same tensor (q, k and v of self-attention) share one statistic: the same object.
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
            batches += 1
    if batches == 0:
        raise ValueError(
            "feature_statistics: loader must yield at least one batch, got none. "
            "A generator can be used once: pass a loader that can be iterated again."
        )
    return collector.result()


class _Collector:
    """Accumulates one statistic per distinct input: a set of slots of one layer that were given one tensor."""

    def __init__(self, slots: Sequence[LoraSlot], kind: str, token_mask: TokenMask | None):
        self.slots, self.kind, self.token_mask = slots, kind, token_mask
        self.by_host: dict[LoraHost, dict[str, LoraSlot]] = {}
        for slot in slots:
            self.by_host.setdefault(slot.host, {})[slot.slot] = slot
        self.moments: dict[tuple[LoraHost, frozenset[str]], Tensor] = {}
        self.counts: dict[tuple[LoraHost, frozenset[str]], int] = {}
        self.batch = 0

    def observe(self, host: LoraHost, inputs: Mapping[str, Tensor]) -> None:
        mine = self.by_host[host]
        groups: dict[int, list[str]] = {}
        for name, x in inputs.items():
            if name in mine:
                groups.setdefault(id(x), []).append(name)
        for names in groups.values():
            x, slot = inputs[names[0]].detach(), mine[names[0]]
            mask = None if self.token_mask is None else self.token_mask(slot, x)
            rows = x.flatten(0, -2) if mask is None else x[mask]
            self.accumulate((host, frozenset(names)), slot, rows)

    def accumulate(self, key: tuple[LoraHost, frozenset[str]], slot: LoraSlot, rows: Tensor) -> None:
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"feature_statistics: features must be finite, got NaN or Inf in batch {self.batch} [{slot.name}]"
            )
        moment = self.moments.get(key)
        if moment is not None and moment.shape[1] != rows.shape[1]:
            raise ValueError(
                f"feature_statistics: features must keep their width, got {rows.shape[1]} after "
                f"{moment.shape[1]} in batch {self.batch} [{slot.name}]"
            )
        self.counts[key] = self.counts.get(key, 0) + rows.shape[0]
        if self.kind == "second_moment":
            with full_precision(rows.device):
                self.moments[key] = gram(rows, out=moment)[0]
            return
        wide = rows.float()
        if moment is None:
            self.moments[key] = wide.clone()
        else:
            shared = min(len(moment), len(wide))
            moment[:shared] += wide[:shared]

    def result(self) -> list[FeatureStatistic]:
        finished: dict[tuple[LoraHost, frozenset[str]], FeatureStatistic] = {}
        for key, moment in self.moments.items():
            if self.kind == "slot_mean":
                mean = moment / (self.batch + 1)
                moment = mean.T @ mean
            finished[key] = FeatureStatistic(moment, self.counts[key])
        result = []
        for slot in self.slots:
            parts = [s for (host, names), s in finished.items() if host is slot.host and slot.slot in names]
            parts = [part for part in parts if part.tokens]
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
