"""What is protected: directions that pretraining put into the weights, and those that tasks' inputs use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from keeplora.distributed import processes
from keeplora.families import token_mask
from keeplora.lora import LoraSlot, TokenMask
from keeplora.math.lowrank import Extension, extend_basis, weight_basis
from keeplora.math.moment import SketchedMoment
from keeplora.math.scale import powers, scaled
from keeplora.methods.method import LossFn
from keeplora.methods.progress import for_all_layers, progress
from keeplora.methods.shares import UNKNOWN, Shares
from keeplora.methods.shortfall import warn_of_shortfall
from keeplora.ops import gram
from keeplora.statistics import feature_statistics

from .config import KeepLoraConfig
from .directions import TaskGradients

__all__ = ["Protected", "extended_bases", "weight_bases"]


@dataclass(frozen=True)
class Protected:
    """What is remembered of one slot between tasks: the basis Q ``[in, k]``, and how much each task added to it.

    ``shares`` are those of gradient energy that lay outside of Q.
    """

    basis: Tensor
    added: tuple[int, ...] = ()
    shares: Shares = UNKNOWN


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
    own_mask: TokenMask | None = None,
    shown: bool | None,
) -> tuple[list[Extension], list[bool]]:
    """Every slot's basis with as many directions of the task's features as ``feature_energy`` of its tower asks for.

    With ``feature_source="gradients"`` C is GᵀG, for the mean gradient G or a sketch of its rows.

    Returns:
        The bases, and for each slot whether any feature came to it: without one its basis stays as it is.

    Warns:
        UserWarning: less was captured than that (``keeplora.methods.shortfall.warn_of_shortfall``).
    """
    energies = [config.feature_energy_of(slot.target.tower) for slot in slots]
    source = _of_gradients if config.feature_source == "gradients" else _of_inputs
    moment, reached = source(model, slots, loader, forward, config, own_mask, shown)

    def compute(group: list[int]) -> list[Extension]:
        return extend_basis([bases[i] for i in group], [moment(i) for i in group], [energies[i] for i in group])

    new = for_all_layers(slots, compute, "bases", shown=shown)
    warn_of_shortfall(config, [slot.name for slot in slots], new, energies)
    return new, reached


_Found = tuple[Callable[[int], Tensor | SketchedMoment], list[bool]]
"""A slot's C by its position, and whether any token came to it."""


def _of_inputs(
    model: nn.Module, slots: Sequence[LoraSlot], loader: Iterable[Any], forward: LossFn, config: KeepLoraConfig,
    own_mask: TokenMask | None, shown: bool | None,
) -> _Found:  # fmt: skip
    with token_mask(model, own_mask) as mask, progress(loader, "features", "batch", shown=shown) as batches:
        statistics = feature_statistics(
            model, slots, batches, forward, kind=config.feature_statistic, token_mask=mask,
            sketch_share=config.sketch_share, seed=config.seed, peers=processes(),
        )  # fmt: skip
    return lambda i: statistics[i].moment, [statistic.tokens > 0 for statistic in statistics]


def _of_gradients(
    model: nn.Module, slots: Sequence[LoraSlot], loader: Iterable[Any], loss_fn: LossFn, config: KeepLoraConfig,
    _: TokenMask | None, shown: bool | None,
) -> _Found:  # fmt: skip
    gradients = TaskGradients(model, slots, loader, loss_fn, replace(config, balance=False), shown=shown)
    sizes = powers("extended_bases", "gradients", gradients.matrices)  # their squares would leave float32's range
    return lambda i: gram(scaled(gradients.matrices[i], sizes[i]))[0], gradients.reached
