"""LiNeS: what a task has changed is scaled by depth once it is learned; on top of any other method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from keeplora.families import find_targets
from keeplora.lora import LoraHost, LoraSlot, Target, depth_factor, depth_positions

from .capacity import Capacity
from .method import LossFn, Method
from .settings import SEEDS, ConfigError, ConfigTypeError, Settings, check_name, check_range, check_whole, plain
from .state import State, StateError

__all__ = ["Lines", "LinesConfig", "layer_scales"]

_BEFORE = "lines:before:"
"""Begins the names of a state's tensors that are not the base method's."""
GRID = tuple(i / 10 for i in range(10, -1, -1))


@dataclass(frozen=True)
class LinesConfig(Settings):
    """Settings of [`Lines`][].

    Args:
        base: Name of the method that learns.
        settings: That method's own settings.
        alpha: Scale of the shallowest block. None chooses it after each task, on validation data.
        grid: What ``alpha`` is chosen from; where several score the same, the first is taken.
        seed: Of the base method, where it draws numbers.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    base: str = "full"
    settings: Mapping[str, Any] = field(default_factory=dict)
    alpha: float | None = None
    grid: tuple[float, ...] = GRID
    seed: int = 0

    def __post_init__(self) -> None:
        check_name(self, "base")
        if not isinstance(self.settings, Mapping):
            raise ConfigTypeError(f"LinesConfig: settings must be names with values, got {self.settings!r}")
        check_range(self, "alpha", "[0, 1]", optional=True)
        if isinstance(self.grid, str) or not isinstance(self.grid, Iterable):
            raise ConfigTypeError(f"LinesConfig: grid must hold numbers, got {self.grid!r}")
        object.__setattr__(self, "grid", tuple(self.grid))
        if not self.grid:
            raise ConfigError("LinesConfig: grid must hold at least one number, got (). Or give alpha.")
        for a in self.grid:
            check_range(self, "grid", "[0, 1]", value=a)
        check_whole(self, "seed", SEEDS)


def layer_scales(names: Iterable[str], targets: Sequence[Target], alpha: float) -> dict[str, float]:
    r"""The scale of every parameter: ``α + (1 − α) l/(L − 1)`` in block l of the L of its tower, ``α`` outside blocks.

    A parameter belongs to a block if it lies in the smallest module that holds all of the block's ``targets``.

    Examples:
        >>> blocks = [Target(f"b.{i}.fc", f"b.{i}.fc", "weight", None, i, "model") for i in range(3)]
        >>> layer_scales(["b.0.fc.weight", "b.1.fc.bias", "b.2.fc.weight", "embedding"], blocks, 0.5)
        {'b.0.fc.weight': 0.5, 'b.1.fc.bias': 0.75, 'b.2.fc.weight': 1.0, 'embedding': 0.5}
    """
    positions = depth_positions(targets)
    blocks: dict[tuple[str, int], list[str]] = {}
    place: dict[tuple[str, int], tuple[int, int]] = {}
    for target in targets:
        key = (target.tower, target.depth)
        parts = target.module.split(".")
        blocks[key] = _common(blocks.get(key, parts), parts)
        place[key] = positions[target.name]
    scales = {}
    for name in names:
        parts = name.split(".")
        inside = [key for key, block in blocks.items() if block and parts[: len(block)] == block]
        scales[name] = depth_factor(alpha, *place[max(inside, key=lambda k: len(blocks[k]))]) if inside else alpha
    return scales


def _common(one: Sequence[str], other: Sequence[str]) -> list[str]:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return list(one[:count])


@dataclass(frozen=True)
class _Cell:
    """A piece of the model's weights: read and written exactly, whatever dtype the layer computes in."""

    name: str
    read: Callable[[], Tensor]
    write: Callable[[Tensor], object]


def _cells(model: nn.Module) -> list[_Cell]:
    cells, taken, adapters = [], set(), set()
    for path, module in model.named_modules():
        if not isinstance(module, LoraHost):
            continue
        for slot in module.places().values():
            name = f"{path}.{slot.parameter}".lstrip(".")
            cells.append(_Cell(name, partial(_exact, slot), slot.set_exact_weight))
            taken.add(id(slot.whole))
            adapters |= {id(p) for p in (slot.adapter.parameters() if slot.adapter is not None else ())}
    for name, parameter in model.named_parameters():
        if id(parameter) not in taken | adapters:
            cells.append(_Cell(name, parameter.detach, parameter.detach().copy_))
    return cells


def _exact(slot: LoraSlot) -> Tensor:
    return slot.exact_weight.detach()


@dataclass(frozen=True)
class _Change:
    """What a task did to one cell."""

    cell: _Cell
    before: Tensor
    after: Tensor

    def scale(self, factor: float) -> None:
        wide = self.before.double()
        scaled = self.after if factor == 1 else (wide + factor * (self.after.double() - wide)).to(self.after.dtype)
        self.cell.write(scaled)


class Lines(Method):
    r"""Another method, and after each task its change of the weights is scaled by depth.

    $$
    W_l \leftarrow W_l^{before} + \lambda_l\,(W_l^{after} - W_l^{before}), \qquad
    \lambda_l = \alpha + (1 - \alpha) \tfrac{l}{L - 1}
    $$

    The deepest block keeps all of it, the shallowest, and what belongs to no block, the share α. ``alpha=None`` takes
    the α of the grid with the best score on held-out data of all tasks so far ([`Method.validate`][], which the
    training loop sets): data that no other method here looks at. Memory: a copy of the model while a task is open, two
    while α is chosen, which takes one validation pass per entry of the grid.

    Source: Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR 2025,
    arXiv:2410.17146. From the paper: the formula. From its public code (wang-kee/LiNeS): β = 1 − α, α for what lies
    outside blocks, the grid 0, 0.1 … 1. Here otherwise: scaled is the change of every task, when it is learned, and
    later tasks go on from there (the paper scales what a single fine-tuning or merging changed); every tower has its
    own depths; the score is the mean accuracy over the tasks so far, where the code weighs the target twice against
    control tasks.

    Examples:
        >>> from keeplora.methods import FullFineTuning
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> method = Lines(FullFineTuning(model))
        >>> method.validate = lambda: -loss_fn(model, data[0]).item()
        >>> method.before_task(data, loss_fn)
        >>> optimizer = method.optimizer(lr=0.01)
        >>> loss_fn(model, data[0]).backward(); optimizer.step()
        >>> method.after_task(data)
        >>> method.alphas
        [1.0]
    """

    name: ClassVar[str] = "lines"
    config_type: ClassVar[type] = LinesConfig
    freezes = False  # the base method does, if it does
    config: LinesConfig

    def __init__(self, base: Method, config: LinesConfig | None = None):
        beside = any(slot.keeps for slot in getattr(base, "slots", ()))
        if not base.trains or not base.merges or beside or isinstance(base, Lines):
            raise ValueError(
                "Lines: base must be another method, one that puts what it learns into the model's weights, got "
                f"{base.name!r}{', which keeps it beside them' if beside else ''}"
            )
        super().__init__(base.model, config, progress=base.progress)
        self.base, self.joint = base, base.joint
        self.targets = find_targets(base.model)
        self.alphas: list[float] = []
        self._before: list[Tensor] = []

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        """As the base method's. RuntimeError where α is to be chosen and nothing can score it."""
        if self.config.alpha is None and self.validate is None:
            raise RuntimeError(
                "before_task: validate must be set for alpha to be chosen, got None. "
                "Set method.validate to a function that scores the model on held-out data, or give alpha."
            )
        self.base.progress, self.base.validate = self.progress, self.validate
        self.base.token_mask = self.token_mask
        before = [cell.read().clone() for cell in _cells(self.model)]
        self.base.before_task(loader, loss_fn, batch_size=self._batch_size)
        self._before = before

    def named_trained(self) -> list[tuple[str, nn.Parameter]]:
        return self.base.named_trained()

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        """The base method's."""
        return self.base.optimizer(**options)

    def adopt(self, optimizer: torch.optim.Optimizer) -> Any:
        return self.base.adopt(optimizer)

    def penalty(self) -> Tensor | None:
        return self.base.penalty()

    def after_step(self) -> None:
        self.base.after_step()

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> Any:
        """Close the base method's task, scale what it changed; returns the base method's report, of the whole change.

        Where ``validate`` fails, the task is closed and not scaled. What is scaled can no longer be written as the
        factors that were trained: ``export_peft`` of the base method refuses it.
        """
        report = self.base.after_task(loader, loss_fn)
        changes = [
            _Change(cell, before, after.clone())
            for cell, before in zip(_cells(self.model), self._before, strict=True)
            if not torch.equal(before, after := cell.read())
        ]
        self._before = []
        try:
            self.alphas.append(self._chosen(changes))
        except BaseException:  # the base method's task is closed: so is this one, unscaled
            self.tasks_learned, self.training_task = self.base.tasks_learned, False
            raise
        if self.alphas[-1] != 1:
            for module in self.model.modules():
                if isinstance(module, LoraSlot):
                    module.forget()
        return report

    def drop_task(self) -> None:
        self.base.abandon_task()
        self._before = []

    def _chosen(self, changes: Sequence[_Change]) -> float:
        """Scale by the given α, or by the best of the grid, which is returned."""
        if self.config.alpha is not None:
            if self.config.alpha != 1:
                self._scale(changes, self.config.alpha)
            return self.config.alpha
        assert self.validate is not None
        best, score = 1.0, float("-inf")
        try:
            for alpha in self.config.grid:
                self._scale(changes, alpha)
                reached = self.validate()
                if reached > score:
                    best, score = alpha, reached
        except BaseException:
            self._scale(changes, 1.0)
            raise
        self._scale(changes, best)
        return best

    def _scale(self, changes: Sequence[_Change], alpha: float) -> None:
        scales = layer_scales((change.cell.name for change in changes), self.targets, alpha)
        for change in changes:
            change.scale(scales[change.cell.name])

    def capacity(self) -> Capacity | None:
        return self.base.capacity()

    def release(self) -> None:
        self.base.release()

    def weights_state(self) -> State:
        """The base method's state, the α that were chosen, and in an open task the weights it began with."""
        return self._weights_state(whole=False)

    def whole_weights_state(self) -> State:
        return self._weights_state(whole=True)

    def _weights_state(self, *, whole: bool) -> State:
        inner = self.base._live_state("state", whole=whole)
        before = {f"{_BEFORE}{i}": tensor for i, tensor in enumerate(self._before)}
        return State(inner.tensors | before, {"base": inner.meta, "alphas": list(self.alphas)}, inner.lasting)

    def recall_weights(self, state: State) -> _Weights:
        inner, alphas = state.meta.get("base"), state.meta.get("alphas")
        tasks, training = state.meta["tasks_learned"], state.meta["training_task"]
        if not isinstance(inner, dict) or (inner.get("tasks_learned"), inner.get("training_task")) != (tasks, training):
            raise StateError(f"load_state: base must be a state after {tasks} tasks, open: {training}, got {inner!r}")
        if inner.get("config") != plain(self.base.config) or inner.get("versions") != state.meta.get("versions"):
            raise StateError(
                "load_state: base must have the settings of this method's base and the versions of the state around "
                f"it, got {inner.get('config')!r} and {inner.get('versions')!r}"
            )
        if not isinstance(alphas, list) or not all(type(a) in (int, float) and 0 <= a <= 1 for a in alphas):
            raise StateError(f"load_state: alphas must be numbers in [0, 1], got {alphas!r}")
        if len(alphas) > tasks:
            raise StateError(f"load_state: alphas must be at most one for each of {tasks} tasks, got {len(alphas)}")
        cells = _cells(self.model) if state.meta["training_task"] else []
        before = [self._stored(state, i, cell) for i, cell in enumerate(cells)]
        tensors = {name: state.tensors[name] for name in state.tensors if not name.startswith(_BEFORE)}
        return _Weights(self.base._checked(State(tensors, inner)), before, alphas)

    def _stored(self, state: State, i: int, cell: _Cell) -> Tensor:
        """What the open task found in a cell: of a weight that is adapted exact, of others in the model's dtype."""
        tensor, now = state.tensors.get(f"{_BEFORE}{i}"), cell.read()
        if tensor is None or tensor.shape != now.shape or tensor.dtype != now.dtype:
            got = None if tensor is None else (list(tensor.shape), tensor.dtype)
            raise StateError(f"load_state: {_BEFORE}{i} must be {list(now.shape)} in {now.dtype}, got {got}")
        if not bool(torch.isfinite(tensor).all()):
            raise StateError(f"load_state: {_BEFORE}{i} must be finite, got NaN or Inf")
        return tensor

    def set_weights(self, weights: _Weights, *, open_task: bool) -> None:
        inner, before, self.alphas = weights
        self._before = [tensor.to(cell.read().device) for tensor, cell in zip(before, _cells(self.model), strict=False)]
        self.base._continue(inner)

    def _guard(self, function: str) -> None:
        """The base method has its own."""

    def _require_same_weights(self, function: str) -> None:
        """The base method does."""


class _Weights(NamedTuple):
    """What a state holds: of the base method, the weights an open task began with, the α that were chosen."""

    inner: Any
    before: list[Tensor]
    alphas: list[float]
