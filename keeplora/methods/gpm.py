"""GPM: full weights, trained outside the span of what earlier tasks fed into each layer."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from keeplora.distributed import processes
from keeplora.lora.optimizer import unwrapped
from keeplora.lora.shares import rows_of
from keeplora.math.lowrank import Extension, extend_basis
from keeplora.ops.declare import OPS
from keeplora.statistics import FeatureStatistic

from .capacity import Capacity
from .flags import freeze
from .lora_method import ON_SHARES, LoraMethod
from .method import LossFn
from .reading import is_counts, stored, stored_basis
from .settings import Settings, check_flag, check_names, check_range, check_whole
from .shares import UNKNOWN, Shares, recalled_shares
from .shortfall import warn_of_shortfall
from .state import State, StateError

__all__ = ["Gpm", "GpmConfig"]

_project_rows = OPS["project_rows"].call  # in every step, so without the checks of its arguments


@dataclass(frozen=True)
class GpmConfig(Settings):
    """Settings of [`Gpm`][].

    Args:
        feature_energy: Share of the first task's feature energy that is protected.
        energy_step: What every later task adds to that share, up to 1.
        target_modules: Names of the layers whose weights are trained, as for the LoRA methods.
        frozen_buffers: Whether running statistics and all other buffers stay as they are while a task is learned.
        memory_budget: Bytes on the device for the features of a pass; 20 % of what is free if None. Where they need
            more, they are gathered in several passes over the data, each for as many layers as fit.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    feature_energy: float = 0.97
    energy_step: float = 0.003
    target_modules: tuple[str, ...] | str = ("attn",)
    frozen_buffers: bool = True
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        check_range(self, "feature_energy", "[0, 1]")
        check_range(self, "energy_step", "[0, 1]")
        check_names(self, "target_modules")
        check_flag(self, "frozen_buffers")
        check_whole(self, "memory_budget", "[0, inf)", optional=True, remedy="It counts bytes.")


class Gpm(LoraMethod):
    r"""Gradient projection memory: every gradient loses its part in the span of earlier tasks' features.

    $$
    \begin{aligned}
    G &\leftarrow G - G M M^\top \\
    M &\leftarrow [M, \text{top of } C], \text{ energy } 0.97 + 0.003\,t
    \end{aligned}
    $$

    with C the second moment of a layer's inputs after task t = 0, 1, … and M ``[in, k]`` orthonormal, empty at first:
    nothing of the pretrained knowledge is protected. The whole weights of the chosen layers are trained, with SGD: an
    optimizer that rescales gradients element by element leaves the free space, and so does weight decay.

    Source: Saha, Garg & Roy, "Gradient Projection Memory for Continual Learning", ICLR 2021. From the paper: both
    formulas (eqs. 5 to 9). From its public code (sahagobinda/GPM): the thresholds, SGD without weight decay. Here
    otherwise: statistics of all tokens of the pass, where the code takes 125 samples; one rank rule, where the code
    takes one direction less after the first task; no biases and norms are trained, which the code does in the first
    task; the gradient is projected as soon as autograd has it, so that any training loop keeps the promise; a schedule
    may add momentum (``keeplora.train``'s ``OneCycleLR`` does, 0.95 to 0.85), which stays in free space.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(4)]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> method = Gpm(model, GpmConfig(feature_energy=0.6, target_modules="all-linear"))
        >>> for _ in range(2):
        ...     method.before_task(data, loss_fn)
        ...     optimizer = method.optimizer(lr=0.1)
        ...     loss_fn(model, data[0]).backward()
        ...     optimizer.step()
        ...     method.after_task(data)
        >>> method.capacity()[0].protected > 0
        True
    """

    name: ClassVar[str] = "gpm"
    config_type: ClassVar[type] = GpmConfig
    trains_weights: ClassVar[bool] = True
    on_shares: ClassVar[frozenset[str]] = ON_SHARES - {"export_peft"} | {"abandon_task"}
    config: GpmConfig

    def __init__(self, model: nn.Module, config: GpmConfig | None = None, **options: Any):
        super().__init__(model, config, **options)
        self.bases: list[Tensor] = [slot.zeros(slot.weight.shape[1], 0, dtype=slot.exact_dtype) for slot in self.slots]
        self.added: list[tuple[int, ...]] = [()] * len(self.slots)
        self.shares = [UNKNOWN] * len(self.slots)  # of the first gradient of a task
        for slot in self.slots:
            slot.forget()  # no adapter will say what was learned
        self._seen = [(0.0, 0.0)] * len(self.slots)  # ‖G P‖² and ‖G‖² of its rows in this process
        self._before: list[Tensor] = []  # every weight, or its rows here, as the open task found it, on the CPU
        self._handles: list[RemovableHandle] = []
        self._members: dict[nn.Parameter, list[int]] = {}  # of the open task; after a forward FSDP2 has others there

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        self._before = [slot.exact_weight.detach().to("cpu", copy=True) for slot in self.slots]
        self._train()

    def _train(self) -> None:
        """Let the chosen weights be trained, with projected gradients."""
        freeze(self.model)
        self._members = self._weights()
        for parameter in self._members:
            parameter.requires_grad_(True)
        self._mark(trained=True)
        self._seen = [(0.0, 0.0)] * len(self.slots)
        self._project()

    def _mark(self, *, trained: bool) -> None:
        for slot in self.slots:
            slot.host.trains_weights = trained

    def _project(self) -> None:
        for parameter, slots in self._members.items():
            if self.shared_out:  # FSDP2 runs these alone: once a gradient is averaged, and its rows are here
                rows = partial(self._project_rows, slots[0])
                self._handles.append(parameter.register_post_accumulate_grad_hook(rows))  # type: ignore[no-untyped-call]
            else:
                hook = partial(self._projected, slots)
                self._handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Gpm:
        """torch copies no hooks of parameters: without them the copy's gradients would stay as they are."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy({**vars(self), "_handles": []}, memo))
        if twin.training_task:
            twin._project()
        return twin

    def export_peft(self, path: str | os.PathLike[str], **_: Any) -> None:
        """Refused: whole weights are trained, which no adapter of a task's rank can say.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "export_peft: what was learned must be updates by adapters, got weights that 'gpm' has trained as a whole. "
            "Save the merged model."
        )

    def _rest(self) -> None:
        """No weight is trained any more."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._members:
            parameter.grad = None  # or it would be added to the next task's
        self._handles, self._before, self._members = [], [], {}
        self._mark(trained=False)
        freeze(self.model)

    def drop_task(self) -> None:
        for slot, before in zip(self.slots, self._before, strict=True):
            slot.set_exact_weight(before.to(slot.weight.device))
        self.shares = [shares.dropped() for shares in self.shares]
        self._rest()

    def named_trained(self) -> list[tuple[str, nn.Parameter]]:
        """The weights of the chosen layers. Of a fused weight, rows that were not chosen get no gradient."""
        return [(self.slots[members[0]].name, parameter) for parameter, members in self._members.items()]

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        """An SGD over ``trainable_parameters``; weight decay is left out, because it would not stay outside M."""
        return torch.optim.SGD(self._trained("optimizer"), **{**options, "weight_decay": 0.0})

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse what is not SGD without weight decay.

        Raises:
            ValueError: it would leave the free space that gradients were projected into.
        """
        inner = unwrapped(optimizer)
        decay = max((float(group.get("weight_decay", 0.0)) for group in inner.param_groups), default=0.0)
        if not isinstance(inner, torch.optim.SGD) or decay:
            got = type(inner).__name__ + (f" with weight_decay={decay:g}" if decay else "")
            raise ValueError(
                f"adopt: optimizer must be SGD without weight decay for {self.name!r}, got {got}: it would leave the "
                "free space that gradients are projected into. Train with method.optimizer(lr=...)."
            )

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        energy = min(self.config.feature_energy + self.config.energy_step * self.tasks_learned, 1.0)
        shared = [basis if basis.shape[1] else None for basis in self.bases]

        def extended(group: list[int], statistics: Mapping[int, FeatureStatistic]) -> list[Extension]:
            moments = [cast(Tensor, statistics[i].moment) for i in group]
            bases = [self.bases[i].to(moment) for i, moment in zip(group, moments, strict=True)]
            return extend_basis(bases, moments, energy)

        new, _ = self.from_features(loader, loss_fn, extended, "bases", shared)
        warn_of_shortfall(self.config, [slot.name for slot in self.slots], new, [energy] * len(new))
        self.shares = [shares.closed() for shares in self._seen_by_all()]
        self.bases = [extension.q for extension in new]
        self.added = [(*counts, e.added) for counts, e in zip(self.added, new, strict=True)]
        self._rest()

    def capacity(self) -> Capacity:
        """Protected and free directions of every chosen weight; a task needs one at least, and gradient in it."""
        return self.capacity_of([basis.shape[1] for basis in self.bases], self.added, 1, self.shares)

    def set_weights(self, weights: Any, *, open_task: bool) -> None:
        super().set_weights(weights, open_task=open_task)
        if open_task:
            self._train()

    def memory_state(self) -> State:
        tensors = {f"{slot.name}.basis": basis for slot, basis in zip(self.slots, self.bases, strict=True)}
        opened = self.slots if self._before else []
        tensors |= {f"{slot.name}.before": w for slot, w in self.whole(opened, self._before).items()}
        shares = self._seen_by_all() if self.shared_out else self.shares
        meta = {"added": [list(counts) for counts in self.added], "free_shares": [list(pair) for pair in shares]}
        return State(tensors, meta)

    def recall(self, state: State) -> _Memory:
        bases = [stored_basis(state, f"{slot.name}.basis", slot.weight.shape[1]) for slot in self.slots]
        rows, counts = state.meta.get("added"), [basis.shape[1] for basis in bases]
        if not is_counts(rows, len(self.slots), state.meta["tasks_learned"]) or [sum(row) for row in rows] != counts:
            raise StateError(f"load_state: added must add up to the directions of every basis, {counts}, got {rows!r}")
        added = [tuple(row) for row in rows]
        opened = self.slots if state.meta["training_task"] else []
        before = [stored(state, f"{slot.name}.before", slot.weight.shape) for slot in opened]
        return _Memory(bases, added, recalled_shares(state, len(self.slots)), before)

    def remember(self, memory: _Memory) -> None:
        self.added, self.shares = memory.added, memory.shares
        self._before = [slot.local.of(w) for slot, w in zip(self.slots, memory.before, strict=False)]
        self.bases = [basis.to(slot.weight.device) for slot, basis in zip(self.slots, memory.bases, strict=True)]

    def _weights(self) -> dict[nn.Parameter, list[int]]:
        """The parameters that a task trains, each with the slots that are rows of it."""
        members: dict[nn.Parameter, list[int]] = {}
        for i, slot in enumerate(self.slots):
            weight = slot.whole
            assert isinstance(weight, nn.Parameter)
            members.setdefault(weight, []).append(i)
        return members

    @torch.no_grad()
    def _projected(self, slots: list[int], gradient: Tensor) -> Tensor:
        """``G − G M Mᵀ`` in the rows of every slot, 0 elsewhere."""
        result = torch.zeros_like(gradient)
        bases = [self.bases[i] for i in slots]
        parts = [self.slots[i].part(gradient).to(basis.dtype) for i, basis in zip(slots, bases, strict=True)]
        free, _ = _project_rows(parts, bases, [1.0] * len(parts), 1)
        for i, part, left in zip(slots, parts, free, strict=True):
            if self.shares[i].opening is None:  # later gradients are of what has been learned
                whole, outside = (float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in (part, left))
                if 0 < whole < math.inf:  # a scaler's first steps may overflow
                    self.shares[i] = self.shares[i].opened(_share(outside**2, whole**2))
        for i, part in zip(slots, free, strict=True):
            self.slots[i].part(result).copy_(part)
        return result

    @torch.no_grad()
    def _project_rows(self, i: int, parameter: nn.Parameter) -> None:
        """``G − G M Mᵀ`` of the rows of a gradient that are in this process: of each row by itself."""
        assert parameter.grad is not None
        gradient, basis = rows_of(parameter.grad).rows, self.bases[i]
        part = gradient.to(basis.dtype)
        (free,), _ = _project_rows([part], [basis], [1.0], 1)
        if not self._seen[i][1]:
            outside, whole = (float(g.double().square().sum()) for g in (free, part))
            if whole < math.inf:
                self._seen[i] = (outside, whole)
        gradient.copy_(free)

    def _seen_by_all(self) -> list[Shares]:
        """What all processes have seen of the task's first gradient: each of its own batches, or of its own rows."""
        peers = processes()
        if not self.shared_out:
            return [_together(shares) for shares in zip(*peers.gather(self.shares), strict=True)]
        found = []
        for mine, parts in zip(self.shares, zip(*peers.gather(self._seen), strict=True), strict=True):
            outside, whole = (sum(column) for column in zip(*parts, strict=True))
            known = mine.opening is not None or not whole  # from a state
            found.append(mine if known else mine.opened(_share(outside, whole)))
        return found


def _share(outside: float, whole: float) -> float:
    return min(outside / whole, 1.0)


def _together(shares: Sequence[Shares]) -> Shares:
    """The mean of what the processes have seen, each in batches of its own."""
    known = [each.opening for each in shares if each.opening is not None]
    return shares[0].opened(sum(known) / len(known) if known else None)


class _Memory(NamedTuple):
    """What a state holds besides the weights."""

    bases: list[Tensor]
    added: list[tuple[int, ...]]
    shares: list[Shares]
    before: list[Tensor]
