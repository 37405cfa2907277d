"""What is protected: directions that pretraining put into the weights, and those that tasks' inputs use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from keeplora.distributed import processes
from keeplora.families import token_mask
from keeplora.lora import LoraSlot
from keeplora.math.lowrank import Extension, extend_basis, weight_basis
from keeplora.methods.method import LossFn
from keeplora.methods.progress import for_all_layers, progress
from keeplora.methods.shortfall import warn_of_shortfall
from keeplora.statistics import feature_statistics

from .config import KeepLoraConfig

__all__ = ["Protected", "extended_bases", "weight_bases"]


@dataclass(frozen=True)
class Protected:
    """What is remembered of one slot between tasks: the basis Q ``[in, k]``, and how much each task added to it."""

    basis: Tensor
    added: tuple[int, ...] = ()


def weight_bases(slots: Sequence[LoraSlot], config: KeepLoraConfig, *, shown: bool | None) -> list[Tensor]:
    """The leading singular vectors of every slot's weight, as many as ``weight_energy`` of its tower asks for."""

    def compute(group: list[int]) -> list[Tensor]:
        return weight_basis(
            [slots[i].exact_weight.detach() for i in group],
            [config.weight_energy_of(slots[i].target.tower) for i in group],
            side=config.weight_side,
        )

    return for_all_layers(slots, compute, "weights", shown=shown)


def extended_bases(
    model: nn.Module,
    slots: Sequence[LoraSlot],
    loader: Iterable[Any],
    forward: LossFn,
    config: KeepLoraConfig,
    bases: Sequence[Tensor],
    *,
    shown: bool | None,
) -> list[Extension]:
    """Every slot's basis with as many directions of the task's features as ``feature_energy`` of its tower asks for.

    Warns:
        UserWarning: a sketch was too narrow for that (:func:`keeplora.methods.shortfall.warn_of_shortfall`).
    """
    energies = [config.feature_energy_of(slot.target.tower) for slot in slots]
    with token_mask(model) as mask, progress(loader, "features", "batch", shown=shown) as batches:
        statistics = feature_statistics(
            model, slots, batches, forward, kind=config.feature_statistic, token_mask=mask,
            sketch_share=config.sketch_share, seed=config.seed, peers=processes(),
        )  # fmt: skip

    def compute(group: list[int]) -> list[Extension]:
        moments = [statistics[i].moment for i in group]
        return extend_basis([bases[i] for i in group], moments, [energies[i] for i in group])

    new = for_all_layers(slots, compute, "bases", shown=shown)
    warn_of_shortfall(config, [slot.name for slot in slots], new, energies)
    return new
