"""GPM: full weights, trained outside the span of what earlier tasks fed into each layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from keeplora.math.lowrank import Extension, extend_basis
from keeplora.math.precision import full_precision
from keeplora.ops.project_rows import project_rows

from .capacity import Capacity, layer_capacity
from .lora_method import LoraMethod, stored
from .method import LossFn, freeze
from .settings import check_names, check_range
from .state import State, StateError

__all__ = ["Gpm", "GpmConfig"]


@dataclass(frozen=True)
class GpmConfig:
    """Settings of :class:`Gpm`.

    Args:
        feature_energy: Share of the first task's feature energy that is protected.
        energy_step: What every later task adds to that share, up to 1.
        target_modules: Names of the layers whose weights are trained, as for the LoRA methods.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    feature_energy: float = 0.97
    energy_step: float = 0.003
    target_modules: tuple[str, ...] | str = ("attn",)

    def __post_init__(self) -> None:
        check_range(self, "feature_energy", "[0, 1]")
        check_range(self, "energy_step", "[0, 1]")
        check_names(self, "target_modules")


class Gpm(LoraMethod):
    r"""Gradient projection memory: every gradient loses its part in the span of earlier tasks' features.

    .. math::
        G &\leftarrow G - G M M^\top \\
        M &\leftarrow [M, \text{top of } C], \text{ energy } 0.97 + 0.003\,t

    with C the second moment of a layer's inputs after task t = 0, 1, … and M ``[in, k]`` orthonormal, empty at first:
    nothing of the pretrained knowledge is protected. The whole weights of the chosen layers are trained, with SGD: an
    optimizer that rescales gradients element by element leaves the free space, and so does weight decay.

    Source: Saha, Garg & Roy, "Gradient Projection Memory for Continual Learning", ICLR 2021. From the paper: both
    formulas (eqs. 5 to 9). From its public code (sahagobinda/GPM): the thresholds, SGD without weight decay. Here
    otherwise: statistics of all tokens of the pass, where the code takes 125 samples; one rank rule, where the code
    takes one direction less after the first task; no biases and norms are trained, which the code does in the first
    task; the gradient is projected as soon as autograd has it, so that any training loop keeps the promise; a schedule
    may add momentum (``keeplora.train``'s ``OneCycleLR`` does, 0.95 to 0.85), which stays in free space.

    Example:
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

    def __init__(self, model: nn.Module, config: GpmConfig | None = None, **options: Any):
        self.config = config or GpmConfig()
        super().__init__(model, self.config, **options)
        self.bases: list[Tensor] = [_nothing(slot.weight) for slot in self.slots]
        self.added: list[tuple[int, ...]] = [()] * len(self.slots)
        self._handles: list[RemovableHandle] = []

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        freeze(self.model)
        for parameter, slots in self._weights().items():
            parameter.requires_grad_(True)
            hook = partial(self._projected, slots)
            self._handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The weights of the chosen layers. Of a fused weight, rows that were not chosen get no gradient."""
        self._require("trainable_parameters", task=True)
        return list(self._weights())

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        """An SGD over :meth:`trainable_parameters`; weight decay is left out, because it would not stay outside M."""
        return torch.optim.SGD(self.trainable_parameters(), **{**options, "weight_decay": 0.0})

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        for slot in self.slots:
            if not torch.isfinite(slot.weight).all():
                raise ValueError(
                    f"after_task: trained weights must be finite, got NaN or Inf [{slot.name}]. "
                    "Go back to the last saved state and lower the learning rate."
                )
        energy = min(self.config.feature_energy + self.config.energy_step * self.tasks_learned, 1.0)
        statistics, shared = self.features(loader, loss_fn), [b if b.shape[1] else None for b in self.bases]

        def extended(i: int) -> Extension:
            moment = statistics[i].moment
            assert isinstance(moment, Tensor)
            (new,) = extend_basis([self.bases[i].to(moment)], [moment], energy)
            return new

        with full_precision(self.slots[0].weight.device):
            new = self.each_layer(extended, "bases", statistics, shared)
        self.bases = [extension.q for extension in new]
        self.added = [(*counts, e.added) for counts, e in zip(self.added, new, strict=True)]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in self._weights():
            parameter.grad = None  # or it would be added to the next task's
        freeze(self.model)

    def capacity(self) -> Capacity:
        """Protected and free directions of every chosen weight; a task needs one at least."""
        layers = (
            layer_capacity(slot.target, basis.shape[0], basis.shape[1], added, 1)
            for slot, basis, added in zip(self.slots, self.bases, self.added, strict=True)
        )
        return Capacity(tuple(layers), self.tasks_learned)

    def memory_state(self) -> State:
        tensors = {f"{slot.name}.basis": basis for slot, basis in zip(self.slots, self.bases, strict=True)}
        return State(tensors, {"added": [list(counts) for counts in self.added]})

    def recall(self, state: State) -> tuple[list[Tensor], list[tuple[int, ...]]]:
        bases = [stored(state, f"{slot.name}.basis", (slot.weight.shape[1], None)) for slot in self.slots]
        added = [tuple(row) for row in state.meta.get("added", ())]
        if [sum(row) for row in added] != [basis.shape[1] for basis in bases]:
            raise StateError("load_state: added must count the directions of every basis, got others")
        return bases, added

    def remember(self, memory: tuple[list[Tensor], list[tuple[int, ...]]]) -> None:
        bases, self.added = memory
        self.bases = [basis.to(slot.weight.device) for slot, basis in zip(self.slots, bases, strict=True)]

    def _weights(self) -> dict[nn.Parameter, list[int]]:
        """The parameters that are trained, each with the slots that are rows of it."""
        found: dict[nn.Parameter, list[int]] = {}
        for i, slot in enumerate(self.slots):
            found.setdefault(getattr(slot.host, slot.host.slots[slot.slot][0]), []).append(i)
        return found

    @torch.no_grad()
    def _projected(self, slots: list[int], gradient: Tensor) -> Tensor:
        """``G − G M Mᵀ`` in the rows of every slot, 0 elsewhere."""
        result = torch.zeros_like(gradient)
        for i in slots:
            _, rows = self.slots[i].host.slots[self.slots[i].slot]
            span = slice(None) if rows is None else slice(*rows)
            basis = self.bases[i]
            with full_precision(gradient.device):
                (free,), _ = project_rows([gradient[span].to(basis.dtype)], [basis], passes=1)
            result[span] = free
        return result


def _nothing(weight: Tensor) -> Tensor:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.new_zeros(weight.shape[1], 0, dtype=dtype)
