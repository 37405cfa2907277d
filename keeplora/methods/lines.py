"""LiNeS: what a task has changed is scaled by depth once it is learned; on top of any other method."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.families import find_targets
from keeplora.lora import LoraHost, Target, depth_factor, depth_positions

from .capacity import Capacity
from .method import LossFn, Method
from .settings import SEEDS, ConfigError, ConfigTypeError, check_name, check_range, check_whole
from .state import State, StateError

__all__ = ["Lines", "LinesConfig", "layer_scales"]

GRID = tuple(i / 10 for i in range(10, -1, -1))


@dataclass(frozen=True)
class LinesConfig:
    """Settings of :class:`Lines`.

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

    Example:
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
    cells, taken = [], set()
    for path, module in model.named_modules():
        if not isinstance(module, LoraHost):
            continue
        for slot, (weight, _) in module.slots.items():
            name = f"{path}.{weight}".lstrip(".")
            cells.append(_Cell(name, partial(module.exact_weight, slot), partial(module.set_exact_weight, slot)))
            taken.add(id(getattr(module, weight)))
    for name, parameter in model.named_parameters():
        if id(parameter) not in taken and ".adapters." not in f".{name}":
            cells.append(_Cell(name, parameter.detach, parameter.detach().copy_))
    return cells


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

    .. math:: W_l \leftarrow W_l^{before} + \lambda_l\,(W_l^{after} - W_l^{before}), \qquad
              \lambda_l = \alpha + (1 - \alpha) \tfrac{l}{L - 1}

    The deepest block keeps all of it, the shallowest, and what belongs to no block, the share α. ``alpha=None`` takes
    the α of the grid with the best score on held-out data of all tasks so far (:attr:`Method.validate`, which the
    training loop sets): data that no other method here looks at. Memory: a copy of the model while a task is open, two
    while α is chosen, which takes one validation pass per entry of the grid.

    Source: Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR 2025,
    arXiv:2410.17146. From the paper: the formula. From its public code (wang-kee/LiNeS): β = 1 − α, α for what lies
    outside blocks, the grid 0, 0.1 … 1. Here otherwise: scaled is the change of every task, when it is learned, and
    later tasks go on from there (the paper scales what a single fine-tuning or merging changed); every tower has its
    own depths; the score is the mean accuracy over the tasks so far, where the code weighs the target twice against
    control tasks.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> method = Lines(model, LinesConfig(base="full"))
        >>> method.validate = lambda: -loss_fn(model, data[0]).item()
        >>> method.before_task(data, loss_fn)
        >>> optimizer = method.optimizer(lr=0.01)
        >>> loss_fn(model, data[0]).backward(); optimizer.step()
        >>> method.after_task(data)
        >>> method.alphas
        [1.0]
    """

    name: ClassVar[str] = "lines"

    def __init__(self, model: nn.Module, config: LinesConfig | None = None):
        from .registry import METHODS, create  # here, because it knows this class too

        self.model, self.config = model, config or LinesConfig()
        name = self.config.base
        if name not in METHODS or name == self.name:
            near = difflib.get_close_matches(name, set(METHODS) - {self.name}, n=3, cutoff=0.3)
            raise ValueError(
                f"LinesConfig: base must be another method, got {name!r}. Nearest names: {', '.join(near or METHODS)}."
            )
        entry = METHODS[name]
        if not getattr(entry.build, "trains", True) or not getattr(entry.build, "merges", True):
            raise ValueError(
                f"LinesConfig: base must be a method that puts what it learns into the model's weights, got {name!r}"
            )
        seeded = {"seed": self.config.seed} if any(f.name == "seed" for f in fields(entry.config)) else {}
        self.targets = find_targets(model)
        self.base = create(name, model, {**seeded, **self.config.settings})
        self.joint = self.base.joint
        self.alphas: list[float] = []
        self._before: list[tuple[_Cell, Tensor]] = []

    def before_task(self, loader: Iterable[Any], loss_fn: LossFn) -> Any:
        """As the base method's. RuntimeError where α is to be chosen and nothing can score it."""
        if self.config.alpha is None and self.validate is None:
            raise RuntimeError(
                "before_task: validate must be set for alpha to be chosen, got None. "
                "Set method.validate to a function that scores the model on held-out data, or give alpha."
            )
        self.base.progress, self.base.validate = self.progress, self.validate
        before = [(cell, cell.read().clone()) for cell in _cells(self.model)]
        result = self.base.before_task(loader, loss_fn)
        self._before = before
        return result

    def trainable_parameters(self) -> list[nn.Parameter]:
        return self.base.trainable_parameters()

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        """The base method's."""
        return self.base.optimizer(**options)

    def penalty(self) -> Tensor | None:
        return self.base.penalty()

    def after_step(self) -> None:
        self.base.after_step()

    @torch.no_grad()
    def after_task(self, loader: Iterable[Any], loss_fn: LossFn | None = None) -> Any:
        """Close the base method's task, scale what it changed; returns the base method's report, of the whole change.

        Where ``validate`` fails, the task is closed and not scaled. What is scaled can no longer be written as the
        factors that were trained: ``export_peft`` of the base method refuses it.
        """
        report = self.base.after_task(loader, loss_fn)
        changes = [
            _Change(cell, before, after.clone())
            for cell, before in self._before
            if not torch.equal(before, after := cell.read())
        ]
        self._before = []
        self.alphas.append(self._chosen(changes))
        if self.alphas[-1] != 1:
            for slot in getattr(self.base, "slots", ()):
                slot.host.learned[slot.slot] = None
        return report

    def _chosen(self, changes: Sequence[_Change]) -> float:
        """Scale by the given α, or by the best of the grid, which is returned."""
        if self.config.alpha is not None:
            self._scale(changes, self.config.alpha)
            return self.config.alpha
        assert self.validate is not None
        best, score = 1.0, float("-inf")
        try:
            for alpha in self.config.grid:
                self._scale(changes, alpha)
                found = self.validate()
                if found > score:
                    best, score = alpha, found
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

    def merge(self) -> nn.Module:
        return self.base.merge()

    def state(self) -> State:
        """The base method's, and the α that were chosen. RuntimeError while a task is open."""
        if self._before:  # a copy of the model that only this process has
            raise RuntimeError("state: the open task must be closed first. Call after_task(loader).")
        state = self.base.state()
        return State(state.tensors, {"method": self.name, "alphas": list(self.alphas), "base": state.meta})

    def load_state(self, state: State) -> None:
        if state.meta.get("method") != self.name or not isinstance(state.meta.get("base"), dict):
            raise StateError(f"load_state: state must be of method {self.name!r}, got {state.meta.get('method')!r}")
        self.base.load_state(State(state.tensors, state.meta["base"]))
        self.alphas = list(state.meta.get("alphas", []))
