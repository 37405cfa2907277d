"""DualLoRA: an orthogonal and a residual adapter, with a dynamic memory and task identities that calibrate logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora._calls import public
from keeplora._messages import listed, warn
from keeplora.distributed import processes
from keeplora.families.class_head import is_image_text_model, observed, put_class_head, require_no_head
from keeplora.families.class_tokens import class_tokens_of
from keeplora.lora import LoraSlot
from keeplora.math.lowrank import TopDirections, extend_basis, top_directions
from keeplora.math.moment import Extension, SketchedMoment
from keeplora.math.rank import fewest_directions, rounding_level
from keeplora.math.subspace import project
from keeplora.methods.lora import LoraConfig, kaiming
from keeplora.methods.lora_method import LoraMethod
from keeplora.methods.method import LossFn
from keeplora.methods.progress import for_all_layers, progress
from keeplora.methods.reading import stored, stored_basis
from keeplora.methods.settings import check_range
from keeplora.methods.shortfall import warn_of_shortfall
from keeplora.methods.state import State, StateError
from keeplora.ops.precision import full_precision
from keeplora.statistics import FeatureStatistic, feature_statistics

from .calibration import ImageFeatures, KnownTask, TaskCalibration
from .residual import DualAdapter, ResidualAdapter

__all__ = ["DualLora", "DualLoraConfig"]


@dataclass(frozen=True)
class DualLoraConfig(LoraConfig):
    """Settings of [`DualLora`][].

    Args:
        r: Rank of the orthogonal adapter, and of each task's residual adapter; less where there is less room.
        alpha: Both are scaled by ``alpha / r``, or ``alpha / sqrt(r)`` with ``rslora``.
        feature_energy: Share of the class tokens' energy that the bases hold; and of the image features', by which
            tasks are told apart.
        calibration: Strength of the calibration of logits by task identity; 0 switches it off.
        target_modules: As for every method.
        seed: As for every method.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> DualLoraConfig(r=4).scaling
        1.0
    """

    feature_energy: float = 0.95
    calibration: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "feature_energy", "(0, 1]")
        check_range(self, "calibration", "[0, inf)")


class DualLora(LoraMethod):
    r"""Two adapters per weight: one outside of what earlier tasks use, one inside what is the task's own.

    $$
    \begin{aligned}
    \Psi_t &= \text{top of } (I - \Phi\Phi^\top)\, C_t\, (I - \Phi\Phi^\top), \text{ energy } \varepsilon,
              \text{ at most } r \\
    y &= x W^\top + s\,(x A_o^\top) B_o^\top + s \sum_{\tau \le t} w_\tau(x_{cls})\,(x A_\tau^\top) B_\tau^\top \\
    A_o &\leftarrow A_o (I - \Phi\Phi^\top), \qquad A_\tau \leftarrow A_\tau \Psi_\tau \Psi_\tau^\top, \qquad
    w_\tau(x) = \min\Bigl(1, \frac{\lVert x \Psi_\tau \rVert^2}{\rho_\tau \lVert x \rVert^2}\Bigr)
    \end{aligned}
    $$

    Before a task, one pass gives the second moment $C_t$ of the class tokens that reach each adapted weight.
    The task's residual bases Ψ are the leading directions of what the basis Φ of earlier tasks leaves of it. The
    orthogonal adapter is merged after the task; then Φ grows by Ψ and by what the class tokens of the learned model
    need to have a share ε of their energy in it (a second pass). Residual adapters stay beside the weight, since
    their scale depends on the sample (the dynamic memory): inference has a price that grows with the tasks. No task
    identity is asked for.

    On image–text models the image features tell tasks apart, and calibrate the logits where classes of several tasks
    are scored together: [`TaskCalibration`][].

    Args:
        model: Any model with linear layers and samples along the first dimension of their inputs. An image–text model
            gets a module ``keeplora_head``.
        config: [`DualLoraConfig`][].

    Raises:
        ValueError: ``target_modules`` matches nothing; an attention layer is not batch first.

    Source: DualLoRA, arXiv:2411.00623: the two adapters and their subspaces, bases from class tokens, the similarity
    to the residual bases that scales the residual adapter, task identity with a confidence that calibrates logits. We
    know of no public code, and formulas beyond this were not at hand. A reconstruction are: the two passes and the
    number of directions; w and its normalisation by the task's own share ρ, so that a task's samples have w near 1 in
    training and in evaluation; that the orthogonal adapter is merged; the first A (Kaiming-uniform outside Φ; Ψ
    itself); energy 0.95; all of the calibration.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = [torch.randn(4, 8) for _ in range(3)]
        >>> method = DualLora(model, DualLoraConfig(r=2, target_modules="all-linear"))
        >>> method.before_task(data, lambda model, batch: model(batch).sum())
        >>> method.after_task(data)
        >>> method.basis("0").shape[0]
        8
    """

    name: ClassVar[str] = "duallora"
    config_type: ClassVar[type] = DualLoraConfig
    merges = False
    rests_with_adapters = True
    config: DualLoraConfig

    @public
    def __init__(self, model: nn.Module, config: DualLoraConfig | None = None, **options: Any):
        self._require_kinds(model, config)
        require_no_head(model)
        with class_tokens_of(model) as (self.tokens, hooks):
            super().__init__(model, config, **options)
        self._hooks += hooks
        for slot in self.slots:
            slot.host.forward_mode = "factored"  # a merged weight cannot depend on the sample
        self.bases = [_wide(slot.weight.new_zeros(slot.weight.shape[1], 0)) for slot in self.slots]
        """By slot, Φ ``[in, k]``: what the class tokens of learned tasks span."""
        self.head: TaskCalibration | None = None
        if is_image_text_model(model):
            self.head = TaskCalibration(self.config.calibration)
            put_class_head(model, self.head)

    def basis(self, name: str) -> Tensor:
        """Φ ``[in, k]`` of a target: a copy."""
        for slot, basis in zip(self.slots, self.bases, strict=True):
            if slot.name == name:
                return basis.clone()
        raise ValueError(f"basis: name must be one of the targets, got {name!r}")

    # ------------------------------------------------------------------ the life of a task

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        statistics = self._class_token_moments(loader, loss_fn)
        own = self._residual_bases(statistics)
        generator, adapters = self.generator(), []
        for slot, phi, (psi, share), seen in zip(self.slots, self.bases, own, statistics, strict=True):
            out, width = slot.weight.shape
            a = kaiming((self.config.r, width), generator, phi.dtype)  # drawn even where no room is left
            rank = min(self.config.r, width - phi.shape[1]) if seen.tokens else 0
            residuals = self._residuals(slot)
            if psi.shape[1]:
                start = torch.eye(psi.shape[1], dtype=psi.dtype, device=psi.device)
                residuals.append(ResidualAdapter(start, psi.new_zeros(out, psi.shape[1]), psi, share, new=True))
            adapters.append(self._adapter(slot, a[:rank].to(phi.device), phi.new_zeros(out, rank), phi, residuals))
        full = [slot.name for slot, phi in zip(self.slots, self.bases, strict=True) if phi.shape[0] == phi.shape[1]]
        if full:
            warn(
                f"DualLora: {len(full)} of {len(self.slots)} layers have no free direction left and do not adapt: "
                f"{listed(full)}. Lower feature_energy for more room."
            )
        for slot in self.slots:
            slot.detach()
        self.attach(adapters)
        for adapter, (psi, _) in zip(adapters, own, strict=True):
            adapter.train_parts(new=bool(psi.shape[1]))

    def adapter_of(self, i: int, tensors: Mapping[str, Tensor]) -> DualAdapter:
        slot = self.slots[i]
        residuals: list[ResidualAdapter] = []
        while any(name.startswith(f"residuals.{len(residuals)}.") for name in tensors):
            prefix = f"residuals.{len(residuals)}."
            mine = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            residuals.append(ResidualAdapter.of(mine))
        out, width = slot.weight.shape
        shapes = [list(tensors["basis"].shape)[:1], *([len(t.B), len(t.basis)] for t in residuals)]
        if shapes != [[width], *([out, width] for _ in residuals)]:
            raise ValueError(f"bases and residual adapters for [{out}, {width}], got {shapes}")
        for name in ("basis", *(f"residuals.{k}.basis" for k in range(len(residuals)))):
            stored_basis(State(dict(tensors), {}), name, width, dtype=tensors["A"].dtype)
        adapter = self._adapter(slot, tensors["A"], tensors["B"], tensors["basis"], residuals)
        adapter.A.requires_grad_(adapter.rank > 0)
        adapter.B.requires_grad_(adapter.rank > 0)
        return adapter

    def drop_task(self) -> None:
        for slot, basis in zip(self.slots, self.bases, strict=True):
            earlier = [task for task in self._residuals(slot) if not task.new]
            slot.detach()
            self._rest(slot, basis, earlier)

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        features = ImageFeatures()
        statistics = self._class_token_moments(loader, loss_fn, features)
        open_bases = []
        for slot, phi in zip(self.slots, self.bases, strict=True):
            mine = [task.basis for task in self._residuals(slot) if task.new]
            open_bases.append(torch.cat([phi, *mine], dim=1))
        new = self._extended(open_bases, [statistic.moment for statistic in statistics])
        if self.head is not None:
            self.head.add(features, self.config.feature_energy)
        for slot, extension in zip(self.slots, new, strict=True):
            residuals, adapter = self._residuals(slot), slot.adapter
            assert isinstance(adapter, DualAdapter)
            slot.detach()
            if adapter.rank:
                slot.attach(adapter.orthogonal())
                slot.merge()
            self._rest(slot, extension.q, residuals)
        self.bases = [extension.q for extension in new]

    # ------------------------------------------------------------------ state

    def memory_state(self) -> State:
        """Φ of every slot, and what tells tasks apart. Residual adapters are in their slots."""
        tensors = {f"{slot.name}.basis": basis for slot, basis in zip(self.slots, self.bases, strict=True)}
        known = [] if self.head is None else self.head.known()
        for i, entry in enumerate(known):
            tensors |= {f"identity.{i}.tokens": entry.tokens, f"identity.{i}.basis": entry.basis}
        return State(tensors, {"identities": [entry.rest for entry in known]})

    def recall(self, state: State) -> tuple[list[Tensor], list[KnownTask]]:
        identities = state.meta.get("identities")
        if not isinstance(identities, list) or not all(isinstance(i, float) and 0 < i <= 1 for i in identities):
            raise StateError(f"load_state: identities must be a list of numbers in (0, 1], got {identities!r}")
        bases = [stored_basis(state, f"{slot.name}.basis", slot.weight.shape[1]) for slot in self.slots]
        known = []
        for i, rest in enumerate(identities):
            tokens = stored(state, f"identity.{i}.tokens", [None, None], whole=True)
            width = len(stored(state, f"identity.{i}.basis", [None, None]))
            known.append(KnownTask(tokens, stored_basis(state, f"identity.{i}.basis", width), rest))
        return bases, known

    def remember(self, memory: tuple[list[Tensor], list[KnownTask]]) -> None:
        bases, known = memory
        self.bases = [basis.to(slot.weight.device) for slot, basis in zip(self.slots, bases, strict=True)]
        if self.head is not None:
            self.head.tasks = nn.ModuleList(known).to(self.slots[0].weight.device).train(self.head.training)

    def release(self) -> None:
        for slot in self.slots:
            slot.detach()
        super().release()
        if self.head is not None:
            put_class_head(self.model, None)

    # ------------------------------------------------------------------ parts

    def _class_token_moments(
        self, loader: Iterable[Any], loss_fn: LossFn, features: ImageFeatures | None = None
    ) -> list[FeatureStatistic]:
        with ExitStack() as stack:
            if self.head is not None and features is not None:
                stack.enter_context(observed(self.head, features.observe))
            batches = stack.enter_context(progress(loader, "class tokens", "batch", shown=self.progress))
            statistics = feature_statistics(
                self.model,
                self.slots,
                batches,
                loss_fn,
                token_mask=self.token_mask or self.tokens.mask,
                peers=processes(),
            )
        if features is not None:
            features.add_up()
        self.warn_of_unreached([statistic.tokens > 0 for statistic in statistics])
        return statistics

    def _residual_bases(self, statistics: Sequence[FeatureStatistic]) -> list[tuple[Tensor, float]]:
        """Ψ and the share of the class tokens' energy in it, of every slot."""

        def compute(group: list[int]) -> list[tuple[Tensor, float]]:
            moments, phis = [_moment(statistics[i]) for i in group], [self.bases[i] for i in group]
            left = [project(c, phi).T.contiguous() for c, phi in zip(moments, phis, strict=True)]
            tops = top_directions(left, phis, [min(self.config.r, len(c)) for c in moments], seed=self.config.seed)
            return [
                _leading(c, phi, top, self.config.feature_energy)
                for c, phi, top in zip(moments, phis, tops, strict=True)
            ]

        with full_precision(self.slots[0].weight.device):
            return for_all_layers(self.slots, compute, "residual bases", shown=self.progress)

    def _extended(self, bases: Sequence[Tensor], moments: Sequence[Tensor | SketchedMoment]) -> list[Extension]:
        energy = self.config.feature_energy

        def compute(group: list[int]) -> list[Extension]:
            return extend_basis([bases[i] for i in group], [moments[i] for i in group], energy)

        new = for_all_layers(self.slots, compute, "bases", shown=self.progress)
        warn_of_shortfall(self.config, [slot.name for slot in self.slots], new, [energy] * len(new))
        return new

    def _adapter(
        self, slot: LoraSlot, a: Tensor, b: Tensor, basis: Tensor, residuals: list[ResidualAdapter]
    ) -> DualAdapter:
        return DualAdapter(
            a, b, self.config.scaling, basis=basis, residuals=residuals, tokens=self.tokens, tower=slot.target.tower
        )

    def _rest(self, slot: LoraSlot, basis: Tensor, residuals: list[ResidualAdapter]) -> None:
        """Between tasks a slot holds its residual adapters, frozen."""
        out, width = slot.weight.shape
        for task in residuals:
            task.new = False
        if residuals:
            none = basis.new_zeros(0, width), basis.new_zeros(out, 0)
            slot.attach(self._adapter(slot, *none, basis[:, :0], residuals).requires_grad_(False))

    def _residuals(self, slot: LoraSlot) -> list[ResidualAdapter]:
        return slot.adapter.tasks() if isinstance(slot.adapter, DualAdapter) else []


def _leading(moment: Tensor, phi: Tensor, top: TopDirections, energy: float) -> tuple[Tensor, float]:
    """The fewest of the leading directions that hold ``energy`` of what Φ leaves, and their share of all there is."""
    total = float(moment.diagonal().double().sum())
    left = total - float(((moment @ phi) * phi).sum(dtype=torch.float64))
    energies = top.s.double()
    count = fewest_directions(energies, max(left, 0.0), energy, floor=float(rounding_level(moment)))
    return top.a[:count].T.contiguous(), float(energies[:count].sum()) / total if total else 0.0


def _moment(statistic: FeatureStatistic) -> Tensor:
    assert isinstance(statistic.moment, Tensor)  # not a sketch: none was asked for
    return statistic.moment


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()
