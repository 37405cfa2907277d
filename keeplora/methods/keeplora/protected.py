"""What is protected: directions that pretraining put into the weights, and those that tasks' inputs use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from keeplora.distributed import processes
from keeplora.lora import LoraSlot, TokenMask
from keeplora.math.batch import within
from keeplora.math.lowrank import Extension, extend_basis, weight_basis
from keeplora.math.moment import SketchedMoment
from keeplora.math.scale import powers, scaled
from keeplora.methods.bases import Bases, keeper_of, narrowed
from keeplora.methods.feature_passes import feature_passes
from keeplora.methods.method import LossFn
from keeplora.methods.progress import for_all_layers, progress
from keeplora.methods.shares import UNKNOWN, Shares
from keeplora.methods.shortfall import warn_of_shortfall
from keeplora.ops import gram
from keeplora.statistics import FeatureStatistic
from keeplora.statistics.budget import budget_of

from .config import KeepLoraConfig
from .directions import TaskGradients

__all__ = ["Protected", "bases_of", "extended_bases", "weight_bases"]


@dataclass(frozen=True)
class Protected:
    """What is remembered of one slot between tasks: the basis Q ``[in, k]``, in parts.

    Attributes:
        parts: The columns that the weights ask for (some in float16: ``keeplora.methods.bases``), and those that
            each task added; none of them ever changes.
        shares: Those of gradient energy that lay outside of Q.
    """

    parts: tuple[Tensor, ...]
    shares: Shares = UNKNOWN

    @property
    def added(self) -> tuple[int, ...]:
        """How many columns each task added."""
        return tuple(part.shape[1] for part in self.parts[1:])

    @property
    def count(self) -> int:
        """How many columns there are."""
        return sum(part.shape[1] for part in self.parts)


def bases_of(slots: Sequence[LoraSlot], protected: Sequence[Protected]) -> Bases:
    """Every slot's basis, on its device when it is asked for."""
    return Bases([p.parts for p in protected], [slot.weight.device for slot in slots])


def weight_bases(slots: Sequence[LoraSlot], config: KeepLoraConfig, *, shown: bool | None) -> list[Tensor]:
    """The leading singular vectors of every slot's weight, as many as ``weight_energy`` of its tower asks for.

    Of weights in fewer than 32 bits a number in float16: to be read by ``keeplora.methods.bases``.
    """
    kept = keeper_of(config.bases)

    def bases_of_weights(weights: list[Tensor], group: Sequence[int]) -> list[Tensor]:
        energies = [config.weight_energy_of(slots[i].target.tower) for i in group]
        found = weight_basis(weights, energies, side=config.weight_side)
        return [kept(narrowed(q) if slots[i].coarse else q) for i, q in zip(group, found, strict=True)]

    if any(slot.exact.first is not None for slot in slots):
        return _of_rows(slots, bases_of_weights, shown)

    def compute(group: list[int]) -> list[Tensor]:
        return bases_of_weights([slots[i].exact_weight.detach() for i in group], group)

    with within(budget_of(config.memory_budget, slots)):
        return for_all_layers(slots, compute, "weights", shown=shown)


def _of_rows(
    slots: Sequence[LoraSlot], bases_of_weights: Callable[[list[Tensor], Sequence[int]], list[Tensor]],
    shown: bool | None,
) -> list[Tensor]:  # fmt: skip
    """Bases of weights whose rows lie in several processes: each of these is given one weight at a time, and says.

    Rows travel in the weight's dtype, once; weights of about one size are looked at in one round.
    """
    peers = processes()
    order = sorted(range(len(slots)), key=lambda i: (-slots[i].weight.numel(), slots[i].name))
    rounds = [order[start : start + peers.size] for start in range(0, len(order), peers.size)]
    found: dict[int, Tensor] = {}
    with progress(rounds, "weights", "round", shown=shown) as counted:
        for members in counted:
            mine: Tensor | None = None
            peers.gather(None)  # who has failed says so here: rows would be waited for
            with peers.in_step():
                for owner, i in enumerate(members):
                    rows = peers.rows_to(owner, slots[i].local.rows, slots[i].weight.shape[0])
                    if rows is not None:
                        mine = rows
            own = members[peers.rank] if peers.rank < len(members) else None
            basis = None
            if mine is not None and own is not None:
                (basis,) = bases_of_weights([mine.to(slots[own].exact_dtype)], [own])
            for owner, i in enumerate(members):
                found[i] = peers.broadcast(owner, basis if i == own else None, slots[i].local.rows)
    return [found[i] for i in range(len(slots))]


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
    """What every slot's basis lacks to have as many directions of the task's features as ``feature_energy`` asks for.

    With ``feature_source="gradients"`` C is GᵀG, for the mean gradient G or a sketch of its rows.

    Returns:
        The new columns, as ``q`` of each extension, kept where the config says; and for each slot whether any feature
        came to it: without one its basis stays as it is.

    Warns:
        UserWarning: less was captured than that (``keeplora.methods.shortfall.warn_of_shortfall``).
    """
    energies, kept = [config.feature_energy_of(slot.target.tower) for slot in slots], keeper_of(config.bases)
    source = _of_gradients if config.feature_source == "gradients" else _of_inputs
    new: dict[int, Extension] = {}
    reached = [False] * len(slots)
    for positions, moment, seen in source(model, slots, loader, forward, config, own_mask, shown):

        def compute(
            group: list[int],
            positions: Sequence[int] = positions,
            moment: Callable[[int], Tensor | SketchedMoment] = moment,
        ) -> list[Extension]:
            mine = [positions[j] for j in group]
            old = [bases[i] for i in mine]
            grown = extend_basis(old, [moment(j) for j in group], [energies[i] for i in mine])
            return [replace(e, q=kept(e.q[:, q.shape[1] :])) for e, q in zip(grown, old, strict=True)]

        with within(budget_of(config.memory_budget, slots)):
            found = for_all_layers([slots[i] for i in positions], compute, "bases", shown=shown)
        new.update(zip(positions, found, strict=True))
        for i, yes in zip(positions, seen, strict=True):
            reached[i] = yes
        del moment, compute  # statistics of these layers make room for the next ones
    extensions = [new[i] for i in range(len(slots))]
    warn_of_shortfall(config, [slot.name for slot in slots], extensions, energies)
    return extensions, reached


_Found = Iterator[tuple[Sequence[int], Callable[[int], Tensor | SketchedMoment], list[bool]]]
"""Positions of slots that are looked at together; by its place among them each one's C; whether a token came to it."""


def _of_inputs(
    model: nn.Module, slots: Sequence[LoraSlot], loader: Iterable[Any], forward: LossFn, config: KeepLoraConfig,
    own_mask: TokenMask | None, shown: bool | None,
) -> _Found:  # fmt: skip
    passes = feature_passes(
        "after_task", model, slots, loader, forward, memory_budget=config.memory_budget, own_mask=own_mask, shown=shown,
        kind=config.feature_statistic, sketch_share=config.sketch_share, seed=config.seed,
        remedy='Raise the budget, or set feature_statistic="sketch".',
    )  # fmt: skip
    for group, statistics in passes:
        yield group, partial(_moment, statistics), [statistic.tokens > 0 for statistic in statistics]
        del statistics


def _moment(statistics: Sequence[FeatureStatistic], i: int) -> Tensor | SketchedMoment:
    return statistics[i].moment


def _of_gradients(
    model: nn.Module, slots: Sequence[LoraSlot], loader: Iterable[Any], loss_fn: LossFn, config: KeepLoraConfig,
    _: TokenMask | None, shown: bool | None,
) -> _Found:  # fmt: skip
    gradients = TaskGradients(model, slots, loader, loss_fn, replace(config, balance=False), shown=shown)
    sizes = powers("extended_bases", "gradients", gradients.matrices)  # their squares would leave float32's range

    def moment(i: int) -> Tensor:
        return gram(scaled(gradients.matrices[i], sizes[i]))[0]

    yield range(len(slots)), moment, gradients.reached
