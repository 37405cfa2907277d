"""HDSD, a reconstruction: updates modulated by subspace, and rescaled where they change a weight unusually much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keeplora.lora import LoraAdapter
from keeplora.math.lowrank import weight_basis
from keeplora.ops.precision import full_precision

from .lora import LoraConfig, SequentialLora
from .method import LossFn
from .progress import for_all_layers
from .reading import stored
from .settings import ConfigError, check_range
from .state import State

__all__ = ["Directions", "Hdsd", "HdsdConfig", "ModulatedAdapter", "update_directions"]


@dataclass(frozen=True)
class HdsdConfig(LoraConfig):
    """Settings of [`Hdsd`][]; no numbers of the paper are known to us.

    Args:
        general_energy: Share of a weight's energy that its general subspace holds.
        general_scale: Scale of updates in the general subspace.
        task_scale: Scale of updates outside of it.
        threshold: How many standard deviations above the mean a relative change may be before it is scaled down to
            that.
        r: As for plain LoRA.
        alpha: As for plain LoRA.
        rslora: As for plain LoRA.
        target_modules: As for plain LoRA.
        seed: As for plain LoRA.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> HdsdConfig(r=4).general_scale
        0.5
    """

    general_energy: float = 0.8
    general_scale: float = 0.5
    task_scale: float = 1.0
    threshold: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "general_energy", "[0, 1]")
        for name in ("general_scale", "task_scale", "threshold"):
            check_range(self, name, "[0, inf)")
        if self.general_scale == self.task_scale == 0:
            raise ConfigError("HdsdConfig: general_scale and task_scale must not both be 0: nothing could be learned")


class ModulatedAdapter(LoraAdapter):
    r"""An adapter on modulated features: general directions of the input count less than the others.

    $$ \Delta W = c\, B A S, \qquad S = \gamma_t (I - V V^\top) + \gamma_g V V^\top $$

    Args:
        a: As of [`LoraAdapter`][]; both are trained.
        b: As of [`LoraAdapter`][]; both are trained.
        scaling: As of [`LoraAdapter`][]; both are trained.
        basis: V ``[in, k]``, the general subspace.
        general: γ_g, the factor of the general directions.
        task: γ_t, that of all others.
    """

    basis: Tensor

    def __init__(self, a: Tensor, b: Tensor, scaling: float, *, basis: Tensor, general: float, task: float):
        super().__init__(a, b, scaling, train_a=True)
        self.register_buffer("basis", basis.detach().clone())
        self.general, self.task = float(general), float(task)

    def down(self) -> Tensor:
        """``A S [r, in]``."""
        return self.task * self.A + (self.general - self.task) * (self.A @ self.basis) @ self.basis.T

    def plain(self) -> LoraAdapter:
        return LoraAdapter(self.down(), self.B, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        t = F.linear(x, self.down().to(x.dtype)) * self.scaling
        return F.linear(t, self.B.to(t.dtype))


class Directions(NamedTuple):
    """Singular triples of an update, ``u [out, n]``, ``s [n]``, ``v [n, in]``, and the relative changes ``[n]``."""

    u: Tensor
    s: Tensor
    v: Tensor
    change: Tensor


def update_directions(weight: Tensor, a: Tensor, b: Tensor) -> Directions:
    r"""The singular directions of an update ``B A`` and how much each changes the weight.

    $$
    B A = \sum_i \sigma_i u_i v_i^\top, \qquad
    \rho_i = \frac{\sigma_i}{\lVert W v_i \rVert + \lVert W \rVert_F / \sqrt{in}}
    $$

    The second term of the denominator is the weight's response to an average direction: a direction W does not respond
    to at all is not an infinite change.

    Args:
        weight: W ``[out, in]``.
        a: ``[r, in]``.
        b: ``[out, r]``.

    Returns:
        At most r directions, in float64; those at the rounding level of the update are left out.
    """
    w, a, b = weight.double(), a.double(), b.double()
    left, core_b = torch.linalg.qr(b)
    right, core_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(core_b @ core_a.T)
    count = int((s > torch.finfo(torch.float32).eps * s.sum()).sum())
    u, s, v = left @ u[:, :count], s[:count], v[:count] @ right.T
    response = torch.linalg.vector_norm(w @ v.T, dim=0) + torch.linalg.matrix_norm(w) / w.shape[1] ** 0.5
    return Directions(u, s, v, torch.where(response > 0, s / response, 0.0))


class Hdsd(SequentialLora):
    r"""Hierarchical dual-subspace decoupling, as far as its abstract tells: a reconstruction.

    $$
    \begin{aligned}
    V &= \text{top right singular vectors of } W, \text{ energy } \varepsilon_g, \qquad
    \Delta W = s\, B A\, \bigl(\gamma_t (I - V V^\top) + \gamma_g V V^\top\bigr) \\
    \Delta W &= \sum_i \sigma_i u_i v_i^\top, \qquad \theta = \mathrm{mean}(\rho) + z\, \mathrm{std}(\rho), \qquad
    W \leftarrow W + \sum_i \min\Bigl(1, \frac{\theta}{\rho_i}\Bigr)\, \sigma_i u_i v_i^\top
    \end{aligned}
    $$

    V is split off anew before each task, from the weight with all earlier tasks merged: the general subspace is what
    pretraining and they share. Updates inside of it are scaled by γ_g, outside by γ_t, in the forward, since under Adam
    a factor on a gradient does nothing. After the task the update is decomposed once more; ρ_i is the relative change
    that its i-th direction means ([`update_directions`][]), and θ adapts to the changes of this weight in all tasks
    so far. What does not exceed it is stable and is fused as learned; what does is drift and is scaled down to θ. The
    result is merged: evaluation costs nothing.

    Args:
        model: Any model with linear layers.
        config: [`HdsdConfig`][].

    Raises:
        ValueError: ``target_modules`` matches nothing; r is larger than a weight's width.

    Source: HDSD, arXiv:2605.07512, abstract only: general and task subspaces split by SVD, an adaptive threshold on
    relative parameter changes across tasks, a scale per subspace. Its feature modulation module, general fusion module
    and hierarchical learning module are read as S, θ and the decomposition above. All formulas and numbers are ours.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> method = Hdsd(model, HdsdConfig(r=2, target_modules="all-linear"))
        >>> method.before_task([], lambda model, batch: model(batch).sum())
        >>> method.slots[0].adapter.basis.shape[0]
        8
    """

    name: ClassVar[str] = "hdsd"
    config_type: ClassVar[type] = HdsdConfig
    config: HdsdConfig

    def __init__(self, model: nn.Module, config: HdsdConfig | None = None, **options: Any):
        super().__init__(model, config, **options)
        for slot in self.slots:
            slot.host.forward_mode = "factored"  # A S is formed with A's gradient
        self.changes = [torch.zeros(3, dtype=torch.float64) for _ in self.slots]
        """By slot: how many relative changes there have been, their sum and the sum of their squares."""

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        energy = self.config.general_energy

        def compute(group: list[int]) -> list[Tensor]:
            return weight_basis([self.slots[i].exact_weight.detach() for i in group], energy)

        bases = for_all_layers(self.slots, compute, "weights", shown=self.progress)
        fresh = self.fresh_factors()
        self.attach([self.adapter_of(i, {**fresh[i], "basis": q.to(fresh[i]["A"])}) for i, q in enumerate(bases)])

    def adapter_of(self, i: int, tensors: Mapping[str, Tensor]) -> ModulatedAdapter:
        general, task, basis = self.config.general_scale, self.config.task_scale, tensors["basis"]
        if basis.dim() != 2 or len(basis) != tensors["A"].shape[1]:
            raise ValueError(f"a basis [{tensors['A'].shape[1]}, k], got shape {list(basis.shape)}")
        scaling = self.scaling_of(i)
        return ModulatedAdapter(tensors["A"], tensors["B"], scaling, basis=basis, general=general, task=task)

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        kept, changes = [], []
        for slot, seen in zip(self.slots, self.changes, strict=True):
            adapter = slot.adapter
            assert isinstance(adapter, ModulatedAdapter)
            with full_precision(slot.weight.device):
                directions = update_directions(slot.exact_weight, adapter.down() * adapter.scaling, adapter.B)
            change = directions.change.cpu()
            seen = seen + torch.stack([torch.tensor(len(change)).double(), change.sum(), change.square().sum()])
            scale = self.rescaling(change, seen).to(directions.s.device)
            a, b = directions.v.to(slot.exact_dtype), (directions.u * (scale * directions.s)).to(slot.exact_dtype)
            kept.append(LoraAdapter(a, b, 1.0))
            changes.append(seen)
        for slot, update in zip(self.slots, kept, strict=True):
            slot.detach()
            if update.rank:
                slot.attach(update)
        self.merge_adapters()
        self.changes = changes

    def rescaling(self, change: Tensor, seen: Tensor) -> Tensor:
        """``min(1, θ/ρ_i)`` for relative changes ρ; ``seen`` has the count, sum and sum of squares of all so far."""
        count, total, squares = seen.tolist()
        if not count:
            return torch.ones_like(change)
        mean = total / count
        threshold = mean + self.config.threshold * max(squares / count - mean**2, 0.0) ** 0.5
        return torch.where(change > threshold, threshold / change, 1.0)

    def memory_state(self) -> State:
        return State({f"{slot.name}.changes": seen for slot, seen in zip(self.slots, self.changes, strict=True)})

    def recall(self, state: State) -> list[Tensor]:
        return [stored(state, f"{slot.name}.changes", [3]).double() for slot in self.slots]

    def remember(self, memory: list[Tensor]) -> None:
        self.changes = [seen.clone() for seen in memory]
