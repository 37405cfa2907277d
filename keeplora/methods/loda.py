"""LoDA: adapters along directions that old and new tasks share, and along those only the new task uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from keeplora.statistics import FeatureStatistic

from .lora_method import LoraMethod
from .method import LossFn
from .reading import is_counts, stored
from .settings import AdapterConfig, check_flag, check_range, check_whole
from .state import State, StateError

__all__ = ["LoDa", "LoDaConfig", "general_directions", "isolated_directions", "recalibrated"]

NOISE = 1e-6  # of the largest: directions with less energy are what rounding leaves


@dataclass(frozen=True)
class LoDaConfig(AdapterConfig):
    """Settings of [`LoDa`][]; the paper's own could not be found.

    Args:
        general_share: Share of the rank r that is general; the rest is isolated. In the first task all is general.
        ridge: ε of ``S_old + ε I``, as a share of the mean eigenvalue of ``S_old``.
        recalibrate: Whether general updates are recalibrated when they are merged.
        memory_budget: Bytes on the device for the features of a pass; 20 % of what is free if None. Where they need
            more, they are gathered in several passes over the data, each for as many layers as fit.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    general_share: float = 0.5
    ridge: float = 1e-2
    recalibrate: bool = True
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "general_share", "[0, 1]")
        check_range(self, "ridge", "[1e-8, inf)")
        check_flag(self, "recalibrate")
        check_whole(self, "memory_budget", "[0, inf)", optional=True, remedy="It counts bytes.")


def general_directions(old: Tensor, new: Tensor, rank: int) -> Tensor:
    r"""The leading eigenvectors of ``S_old + S_new``, as rows ``[rank, in]`` in float64; fewer where energy ends.

    Args:
        old: Second moments ``[in, in]``, symmetric positive semidefinite, of the same scale.
        new: Second moments ``[in, in]``, symmetric positive semidefinite, of the same scale.

    Examples:
        >>> old, new = torch.diag(torch.tensor([2.0, 0.0, 1.0])), torch.diag(torch.tensor([2.0, 1.0, 0.0]))
        >>> general_directions(old, new, 1).abs()
        tensor([[1., 0., 0.]], dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(old.double() + new.double())
    count = min(rank, int((values > NOISE * values[-1]).sum()))
    leading: Tensor = vectors.flip(1)[:, :count].T
    return leading


def isolated_directions(old: Tensor, new: Tensor, rank: int, ridge: float) -> Tensor:
    r"""Directions of large ``S_new`` and small ``S_old``: of the leading generalised Rayleigh quotients.

    $$
    \max_v \frac{v^\top S_{new} v}{v^\top (S_{old} + \varepsilon I) v}, \qquad
    L L^\top = S_{old} + \varepsilon I, \quad v = L^{-\top} u, \quad u \text{ of } L^{-1} S_{new} L^{-\top}
    $$

    Args:
        old: Second moments ``[in, in]``, symmetric positive semidefinite.
        new: Second moments ``[in, in]``, symmetric positive semidefinite.
        ridge: ε as a share of the mean eigenvalue of ``old`` (of ``new`` where ``old`` is 0), above 0.

    Returns:
        Orthonormal rows ``[rank, in]`` in float64 that span the leading ``rank`` directions, and the leading j of them
        the leading j; fewer where the quotients end.

    Examples:
        >>> old, new = torch.diag(torch.tensor([4.0, 0.0, 1.0])), torch.diag(torch.tensor([9.0, 1.0, 1.0]))
        >>> isolated_directions(old, new, 1, ridge=0.01).abs().round()
        tensor([[0., 1., 0.]], dtype=torch.float64)
    """
    s_old, s_new = old.double(), new.double()
    mean = s_old.diagonal().mean()
    mean = mean if mean > 0 else s_new.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.linalg.cholesky(s_old + ridge * mean * torch.eye(len(s_old), dtype=s_old.dtype, device=s_old.device))
    half = torch.linalg.solve_triangular(factor, s_new, upper=False)
    quotient = torch.linalg.solve_triangular(factor, half.T, upper=False)
    values, vectors = torch.linalg.eigh((quotient + quotient.T) / 2)
    count = min(rank, int((values > NOISE * values[-1]).sum()))
    leading = torch.linalg.solve_triangular(factor.T, vectors.flip(1)[:, :count], upper=True)
    q: Tensor = torch.linalg.qr(leading / torch.linalg.vector_norm(leading, dim=0)).Q
    return q.T


def recalibrated(b: Tensor, a: Tensor, old: Tensor, new: Tensor) -> Tensor:
    r"""The update of the general directions that old and new tasks together would choose.

    $$
    B' = \arg\min_{B'}\; \mathrm{tr}\bigl(B' A S_{old} A^\top B'^\top\bigr)
    + \mathrm{tr}\bigl((B' - B) A S_{new} A^\top (B' - B)^\top\bigr)
    = B\, (A S_{new} A^\top)\, \bigl(A (S_{old} + S_{new}) A^\top\bigr)^{-1}
    $$

    Outputs on old features are to stay, those on new ones to be what was trained.

    Args:
        b: ``[out, r]``.
        a: ``[r, in]``.
        old: second moments ``[in, in]`` of the same scale.
        new: second moments ``[in, in]`` of the same scale.

    Returns:
        B' in the dtype of ``b``; b itself where ``old`` is 0.

    Examples:
        >>> a, eye = torch.tensor([[1.0, 0.0]]), torch.eye(2)
        >>> recalibrated(torch.tensor([[4.0]]), a, 3 * eye, eye)
        tensor([[1.]])
    """
    rows = a.double()
    wanted, both = rows @ new.double() @ rows.T, rows @ (old.double() + new.double()) @ rows.T
    # pinv: a direction that no feature has left, old or new, changes no output; its update is dropped
    best: Tensor = b.double() @ wanted @ torch.linalg.pinv(both, hermitian=True)
    return best.to(b.dtype)


class LoDa(LoraMethod):
    r"""LoRA along two fixed sets of directions: shared with earlier tasks, and the new task's own.

    $$
    \begin{aligned}
    A &= [\,\text{general}(S_{old} + S_{new});\ \text{isolated}(S_{new}, S_{old})\,], \quad B = 0 \\
    W &\leftarrow W + s\,(B'_G A_G + B_I A_I), \qquad S_{old} \leftarrow S_{old} + S_{new}
    \end{aligned}
    $$

    with [`general_directions`][], [`isolated_directions`][], and B' of [`recalibrated`][]. B is trained, A is
    frozen. S are mean second moments of a layer's inputs: before the task for A, after it for the memory and for B'.
    Memory: ``4 in²`` bytes for each distinct input.

    Source: He et al., "Task-Driven Subspace Decomposition for Knowledge Sharing and Isolation in LoRA-based Continual
    Learning", ICML 2026, arXiv:2603.00191. From the paper: general and isolated subspaces by energy and by a
    generalised Rayleigh quotient, fixed down-projections, a closed-form recalibration of the general update. A
    reconstruction: the objective of [`recalibrated`][], ε, the split of r, orthonormal rows, equal weight of every
    task in S_old. Left out: the paper's gradient-aligned optimisation of B, of which no formula was found.

    Warns:
        UserWarning: a layer's inputs have less than r useful directions (what there is is used).
    """

    name: ClassVar[str] = "loda"
    keeps_beside: ClassVar[bool] = True
    config_type: ClassVar[type] = LoDaConfig
    whole_spectra: ClassVar[bool] = True
    config: LoDaConfig

    def __init__(self, model: nn.Module, config: LoDaConfig | None = None, **options: Any):
        super().__init__(model, config, **options)
        self.moments: list[Tensor | None] = [None] * len(self.slots)
        self.general: list[int] = [0] * len(self.slots)  # leading rows of the open adapters' A

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        def design(i: int, statistic: FeatureStatistic) -> tuple[Tensor, int]:
            new, r = _mean(statistic), self.config.r
            old = self.moments[i]
            if old is None:
                a = general_directions(torch.zeros_like(new), new, r)
                return a.to(new.dtype), len(a)
            general = general_directions(old, new, round(self.config.general_share * r))
            isolated = isolated_directions(old, new, r - len(general), self.config.ridge)
            return torch.cat([general, isolated]).to(new.dtype), len(general)

        with torch.no_grad():
            designs, unreached = self.from_features(
                loader, loss_fn, lambda group, found: [design(i, found[i]) for i in group], "adapters", self.moments
            )
        self.warn_of_ranks([len(a) for a, _ in designs], none="useful free direction left", unreached=unreached)
        self.attach([self.adapter_along(i, a) for i, (a, _) in enumerate(designs)])
        self.general = [count for _, count in designs]

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        def learned(group: list[int], statistics: Mapping[int, FeatureStatistic]) -> Iterator[_Learned]:
            for i in group:
                new, old = statistics[i], self.moments[i]
                alike = [j for j, other in statistics.items() if other is new and self.moments[j] is old]
                yield _Learned(_sum(old, _mean(new)), {j: self._recalibrated(j, new) for j in alike})

        found, _ = self.from_features(loader, loss_fn, learned, "memory", self.moments)
        updates = [each.updates[i] for i, each in enumerate(found)]
        for slot, b in zip(self.slots, updates, strict=True):
            if b is not None and slot.adapter is not None:
                slot.adapter.B.copy_(b)
        self.merge_adapters()
        self.moments = [each.moment for each in found]

    def _recalibrated(self, i: int, new: FeatureStatistic) -> Tensor | None:
        """B of the slot as it is to be merged; None where it stays."""
        adapter, old, count = self.slots[i].adapter, self.moments[i], self.general[i]
        if adapter is None or old is None or not count or not new.tokens or not self.config.recalibrate:
            return None
        general = recalibrated(adapter.B[:, :count], adapter.A[:count], old, _mean(new))
        return torch.cat([general, adapter.B[:, count:]], dim=1)

    def memory_state(self) -> State:
        pairs = zip(self.slots, self.moments, strict=True)
        moments = {f"{slot.name}.moment": moment for slot, moment in pairs if moment is not None}
        return State(moments, {"general": self.general if self.training_task else None})

    def recall(self, state: State) -> tuple[list[Tensor | None], list[int]]:
        general = state.meta.get("general")
        opened = state.meta["training_task"]
        rows = [general if opened else [0] * len(self.slots)]
        if not opened and general is not None:
            raise StateError(f"load_state: general must be null between tasks, got {general!r}")
        if not is_counts(rows, 1, len(self.slots)) or max(rows[0]) > self.config.r:
            raise StateError(f"load_state: general must be {len(self.slots)} numbers up to r, got {general!r}")
        if not state.meta["tasks_learned"]:
            return [None] * len(self.slots), rows[0]
        widths = [slot.weight.shape[1] for slot in self.slots]
        moments: list[Tensor | None] = [
            stored(state, f"{slot.name}.moment", (n, n)).to(slot.weight.device)
            for slot, n in zip(self.slots, widths, strict=True)
        ]
        return moments, rows[0]

    def remember(self, memory: tuple[list[Tensor | None], list[int]]) -> None:
        self.moments, self.general = memory


class _Learned(NamedTuple):
    """Of slots that read one tensor: the moment of all tasks, and by slot the B that is merged, None where it stays."""

    moment: Tensor
    updates: dict[int, Tensor | None]


def _mean(statistic: FeatureStatistic) -> Tensor:
    """``E[xᵀx]``: the second moment of a token; zero where there was none."""
    moment = statistic.moment
    assert isinstance(moment, Tensor)
    return moment / max(statistic.tokens, 1)


def _sum(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else old + new
