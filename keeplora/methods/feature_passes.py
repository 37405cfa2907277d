"""Features of a task's inputs within ``memory_budget``: for some layers at a time, in as many passes as that takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from keeplora.distributed import processes
from keeplora.families import token_mask
from keeplora.lora import LoraSlot, TokenMask
from keeplora.statistics import FeatureStatistic, feature_statistics
from keeplora.statistics.budget import feature_groups
from keeplora.statistics.features import FeatureKind, require_seen

from .method import LossFn
from .progress import progress

__all__ = ["feature_passes"]


def feature_passes(
    function: str,
    model: nn.Module,
    slots: Sequence[LoraSlot],
    loader: Iterable[Any],
    forward: LossFn,
    *,
    memory_budget: int | None,
    own_mask: TokenMask | None,
    shown: bool | None,
    kind: FeatureKind = "second_moment",
    sketch_share: float = 0.25,
    seed: int = 0,
    whole_spectra: bool = False,
    remedy: str = "Raise the budget.",
) -> Iterator[tuple[list[int], list[FeatureStatistic]]]:
    """Yield positions of slots and their statistics, of one pass over ``loader`` after the other.

    Statistics of one pass make room for those of the next once nobody holds them.

    Args:
        function: What the user called.
        whole_spectra, remedy: As of ``feature_groups``.

    Raises:
        ValueError: no token counted in any of the layers.
    """
    groups = feature_groups(
        model, slots, loader, forward, function=function,
        kind=kind, sketch_share=sketch_share, memory_budget=memory_budget, whole_spectra=whole_spectra, remedy=remedy,
        peers=processes(),
    )  # fmt: skip
    tokens = 0
    for number, group in enumerate(groups, 1):
        phase = "features" if len(groups) == 1 else f"features, {number} of {len(groups)}"
        with token_mask(model, own_mask) as mask, progress(loader, phase, "batch", shown=shown) as batches:
            statistics = feature_statistics(
                model, [slots[i] for i in group], batches, forward, kind=kind, token_mask=mask,
                sketch_share=sketch_share, seed=seed, peers=processes(), some_unseen=True,
            )  # fmt: skip
        tokens += sum(statistic.tokens for statistic in statistics)
        if number == len(groups) and not tokens:
            require_seen(slots, statistics)
        yield group, statistics
        del statistics
