"""InfLoRA: adapters along the new task's inputs, outside of earlier tasks' features; DualGPM as its memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from keeplora.math.lowrank import Extension, extend_basis
from keeplora.math.orthonormal import complement, reorthogonalize
from keeplora.math.rank import fewest_directions, rounding_level
from keeplora.statistics import FeatureStatistic

from .bases import keeper_of
from .capacity import Capacity
from .lora_method import ON_SHARES, LoraMethod
from .method import LossFn
from .reading import is_counts, stored_basis
from .settings import AdapterConfig, check_choice, check_range, check_whole
from .shares import UNKNOWN, Shares, recalled_shares
from .shortfall import warn_of_shortfall
from .state import State, StateError

__all__ = ["DualBasis", "InfLora", "InfLoraConfig", "extended"]


@dataclass(frozen=True)
class InfLoraConfig(AdapterConfig):
    """Settings of [`InfLora`][], those of the public code on ImageNet-R.

    Args:
        feature_energy: Share of the feature energy that is protected after the first task.
        final_energy: The share after ``tasks`` tasks; in between it grows in equal steps.
        tasks: Tasks in the sequence.
        statistic: What energy is measured in: ``"squared"`` in squared eigenvalues of the second moment C, as in the
            public code, whose shares belong to it; ``"moment"`` in its eigenvalues, as in the paper.
        bases: Where what is protected is kept while nothing needs it: ``"host"``, main memory, or ``"device"``.
        memory_budget: Bytes on the device for the features of a pass; 20 % of what is free if None. Where they need
            more, they are gathered in several passes over the data, each for as many layers as fit.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    r: int = 10
    feature_energy: float = 0.98
    final_energy: float = 1.0
    tasks: int = 10
    statistic: Literal["squared", "moment"] = "squared"
    bases: Literal["host", "device"] = "host"
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "feature_energy", "[0, 1]")
        check_range(self, "final_energy", "[0, 1]")
        check_whole(self, "tasks", "[1, inf)")
        check_choice(self, "statistic", ("squared", "moment"))
        check_choice(self, "bases", ("host", "device"))
        check_whole(self, "memory_budget", "[0, inf)", optional=True, remedy="It counts bytes.")

    def energy_after(self, task: int) -> float:
        """The share that is protected after task 0, 1, …

        Examples:
            >>> [round(InfLoraConfig(tasks=4).energy_after(t), 3) for t in (0, 1, 4, 9)]
            [0.98, 0.985, 1.0, 1.0]
        """
        step = (self.final_energy - self.feature_energy) / self.tasks
        return self.feature_energy + step * min(task, self.tasks)


@dataclass(frozen=True)
class DualBasis:
    """A protected subspace, by a basis of itself or of its complement, whichever is smaller (DualGPM).

    Attributes:
        columns: ``[in, k]``, orthonormal, ``k <= in / 2``.
        free: Whether they span what is free, rather than what is protected.
    """

    columns: Tensor
    free: bool = False

    @property
    def protected(self) -> int:
        """Directions that are protected."""
        width, count = self.columns.shape
        return width - count if self.free else count

    def free_space(self) -> Tensor:
        """An orthonormal basis of what is free, in float64."""
        wide: Tensor = self.columns.double()
        return wide if self.free else complement(wide)

    def free_share(self, moment: Tensor) -> float | None:
        """Of the energy in ``moment [in, in]``, what lies in free space; None where there is none."""
        wide, columns = moment.double(), self.columns.double()
        total, held = (float(m.diagonal().sum()) for m in (wide, columns.T @ wide @ columns))
        if not total:
            return None
        return min(max(held / total if self.free else 1 - held / total, 0.0), 1.0)

    def _without(self, moment: Tensor, energy: float) -> tuple[DualBasis, Extension]:
        """Of a basis of what is free: less the leading eigenvectors of FᵀSF."""
        space, wide = self.columns.double(), moment.double()
        values, vectors = torch.linalg.eigh(space.T @ wide @ space)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        total = float(wide.diagonal().sum())
        if not total:
            return self, Extension(self.columns, 0, 0.0, 0.0)  # no input came here
        floor = float(rounding_level(moment))
        captured = max(total - float(values.sum()), 0.0)
        count = fewest_directions(values, total, energy, captured=captured, floor=floor)
        (left,) = reorthogonalize([(space @ vectors[:, count:]).to(self.columns.dtype)])
        captured += float(values[:count].sum())
        return DualBasis(left, free=True), Extension(left, count, captured, total)


def extended(bases: Sequence[DualBasis], moments: Sequence[Tensor], energy: float) -> list[DualBasis]:
    r"""With the fewest more directions of every moment protected that bring its captured share to ``energy``.

    $$ \frac{\mathrm{tr}\,S - \mathrm{tr}(F^\top S F)}{\mathrm{tr}\,S} \ge \varepsilon $$

    for F the basis of what stays free: the leading eigenvectors of ``FᵀSF`` leave it. Where more than half of all
    directions are protected, the complement is kept from then on.

    Args:
        moments: S ``[in, in]`` for each basis, symmetric positive semidefinite, all float32 or all float64.

    Examples:
        >>> s = torch.diag(torch.tensor([6.0, 3.0, 1.0, 0.0]))
        >>> (one,) = extended([DualBasis(torch.zeros(4, 0))], [s], 0.6)
        >>> (two,) = extended([one], [s], 0.95)
        >>> one.protected, one.free, two.protected, two.free, list(two.columns.shape)
        (1, False, 3, True, [4, 1])
    """
    return [basis for basis, _ in _grown(bases, moments, energy)]


def _grown(bases: Sequence[DualBasis], moments: Sequence[Tensor], energy: float) -> list[tuple[DualBasis, Extension]]:
    """``extended``, and what each holds of its moment."""
    held = [i for i, basis in enumerate(bases) if not basis.free]
    grown = extend_basis([bases[i].columns.to(moments[i].dtype) for i in held], [moments[i] for i in held], energy)
    new = {i: (_smaller(extension.q), extension) for i, extension in zip(held, grown, strict=True)}
    return [new[i] if i in new else basis._without(moments[i], energy) for i, basis in enumerate(bases)]


def _smaller(q: Tensor) -> DualBasis:
    width, count = q.shape
    return DualBasis(q) if 2 * count <= width else DualBasis(complement(q.double()).to(q.dtype), free=True)


class InfLora(LoraMethod):
    r"""LoRA whose A is designed before each task, so that it cannot disturb earlier ones; B is trained.

    $$
    \begin{aligned}
    A &= \tfrac{1}{\sqrt 3}\, \text{top-}r \text{ eigenvectors of } P S P, \quad P = I - M M^\top, \quad B = 0 \\
    y &= x W^\top + s\,(x A^\top) B^\top, \qquad W \leftarrow W + s\,B A \\
    M &\leftarrow [M, \text{top of } S], \text{ energy } \varepsilon_t = \varepsilon_0 + (\varepsilon_T -
          \varepsilon_0)\, t / T
    \end{aligned}
    $$

    S is the square of the second moment C of the layer's inputs (``statistic="moment"``: C itself), before the task for
    A and after it for M. M is kept as a basis of the protected space until that passes half of all directions, of its
    complement from then on ([`DualBasis`][]).

    Source: Liang & Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", CVPR 2024,
    arXiv:2404.00228. From the paper: design of A, DualGPM. From its public code (liangyanshuo/InfLoRA): the factor
    1/√3, scale 1, thresholds and their ramp, and energies by singular values of C where the paper has those of the
    inputs. Here otherwise: all chosen layers rather than k and v; one rank rule, where the code takes one direction
    less after the first task, and takes protected directions for free ones when that task passes half already.

    Warns:
        UserWarning: a layer has less than r free directions (what is left is used), or none (it is skipped); a basis
            holds less of the features than it should.
    """

    name: ClassVar[str] = "inflora"
    keeps_beside: ClassVar[bool] = True
    config_type: ClassVar[type] = InfLoraConfig
    on_shares: ClassVar[frozenset[str]] = ON_SHARES
    whole_spectra: ClassVar[bool] = True
    config: InfLoraConfig

    def __init__(self, model: nn.Module, config: InfLoraConfig | None = None, **options: Any):
        super().__init__(model, config, **options)
        self.bases: list[DualBasis | None] = [None] * len(self.slots)  # None: nothing is protected yet
        self.added: list[tuple[int, ...]] = [()] * len(self.slots)
        self.shares = [UNKNOWN] * len(self.slots)  # of inputs: no gradient is looked at

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        def design(i: int, statistic: FeatureStatistic) -> tuple[Tensor, float | None]:
            energy = self._energy(statistic)
            space = self._basis(i).free_space()
            values, vectors = torch.linalg.eigh(space.T @ energy.double() @ space)
            count = min(self.config.r, int((values > rounding_level(energy)).sum()))
            a: Tensor = (space @ vectors.flip(1)[:, :count]).T / math.sqrt(3)
            return a.to(energy.dtype), self._basis(i).free_share(_exact(statistic))

        with torch.no_grad():
            designs, unreached = self.from_features(
                loader, loss_fn, lambda group, found: [design(i, found[i]) for i in group], "adapters", self.bases
            )
        self.warn_of_ranks([len(a) for a, _ in designs], none="useful free direction left", unreached=unreached)
        self.attach([self.adapter_along(i, a) for i, (a, _) in enumerate(designs)])
        self.shares = [shares.opened(share) for shares, (_, share) in zip(self.shares, designs, strict=True)]

    def drop_task(self) -> None:
        super().drop_task()
        self.shares = [shares.dropped() for shares in self.shares]

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        share = self.config.energy_after(self.tasks_learned)

        def grown(group: list[int], statistics: Mapping[int, FeatureStatistic]) -> list[tuple[DualBasis, Extension]]:
            return _grown([self._basis(i) for i in group], [self._energy(statistics[i]) for i in group], share)

        both, _ = self.from_features(loader, loss_fn, grown, "bases", self.bases)
        new, extensions = [basis for basis, _ in both], [extension for _, extension in both]
        warn_of_shortfall(self.config, [slot.name for slot in self.slots], extensions, [share] * len(new))
        self.merge_adapters()
        counts = [n.protected - self._basis(i).protected for i, n in enumerate(new)]
        self.added = [(*before, count) for before, count in zip(self.added, counts, strict=True)]
        kept = keeper_of(self.config.bases)
        own = {id(basis): replace(basis, columns=kept(basis.columns)) for basis in new}  # one for q, k and v
        self.bases = [own[id(basis)] for basis in new]
        self.shares = [shares.closed() for shares in self.shares]

    def capacity(self) -> Capacity:
        """What is protected, free and was added in every adapted weight; shares are of the inputs' energy."""
        counts = [self._basis(i).protected for i in range(len(self.slots))]
        return self.capacity_of(counts, self.added, self.config.r, self.shares)

    def memory_state(self) -> State:
        tensors = {f"{slot.name}.basis": b.columns for slot, b in zip(self.slots, self.bases, strict=True) if b}
        meta = {
            "free": [bool(b and b.free) for b in self.bases],
            "added": [list(counts) for counts in self.added],
            "free_shares": [list(pair) for pair in self.shares],
        }
        return State(tensors, meta)

    def recall(self, state: State) -> _Memory:
        counts, free = state.meta.get("added"), state.meta.get("free")
        if not is_counts(counts, len(self.slots), state.meta["tasks_learned"]):
            raise StateError(
                f"load_state: added must have {state.meta['tasks_learned']} numbers for each of {len(self.slots)} "
                f"targets, got {counts!r}"
            )
        if not isinstance(free, list) or [type(f) for f in free] != [bool] * len(self.slots):
            raise StateError(f"load_state: free must be {len(self.slots)} times true or false, got {free!r}")
        added = [tuple(row) for row in counts]
        bases: list[DualBasis | None] = [None] * len(self.slots)
        if state.meta["tasks_learned"]:
            columns = [stored_basis(state, f"{slot.name}.basis", slot.weight.shape[1]) for slot in self.slots]
            bases = [
                DualBasis(q if self.config.bases == "host" else q.to(slot.weight.device), free=f)
                for slot, q, f in zip(self.slots, columns, free, strict=True)
            ]
        return _Memory(bases, added, recalled_shares(state, len(self.slots)))

    def remember(self, memory: _Memory) -> None:
        self.bases, self.added, self.shares = memory

    def _basis(self, i: int) -> DualBasis:
        weight = self.slots[i].weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        held = self.bases[i]
        if held is None:
            return DualBasis(self.slots[i].zeros(weight.shape[1], 0, dtype=dtype))
        return replace(held, columns=held.columns.to(weight.device))

    def _energy(self, statistic: FeatureStatistic) -> Tensor:
        """S, of trace 1: C, or its square."""
        moment = _exact(statistic)
        wide = moment.double()
        wide = wide @ wide if self.config.statistic == "squared" else wide
        trace = wide.diagonal().sum()
        return (wide / trace.clamp_min(torch.finfo(torch.float64).tiny)).to(moment.dtype)


def _exact(statistic: FeatureStatistic) -> Tensor:
    """C."""
    assert isinstance(statistic.moment, Tensor)
    return statistic.moment


class _Memory(NamedTuple):
    """What a state holds besides the weights."""

    bases: list[DualBasis | None]
    added: list[tuple[int, ...]]
    shares: list[Shares]
