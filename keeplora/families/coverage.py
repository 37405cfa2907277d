"""What is adapted of a model and what is left out, by tower and kind, with shares of the blocks' weights."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from keeplora._messages import listed, warn
from keeplora.lora import Target, expert_layout, linear_targets, select_targets
from keeplora.lora.quantised import layer_shape

from ._blocks import by_design, outermost_lists

__all__ = ["Targets", "WeightKind", "coverage", "warn_of_left_out"]

State = Literal["adapted", "not chosen", "frozen", "left out", "other blocks"]
TOLD_FROM = 0.01
"""The share of a tower's weights from which it is told that they are left out."""
_FROZEN = (nn.Embedding, nn.modules.conv._ConvNd, nn.LayerNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class WeightKind:
    """The weights of one kind in the blocks of one tower.

    Attributes:
        tower: Of the targets that stand in the same list of blocks; of lists without any, their path.
        kind: The name inside a block: ``self_attn.q_proj``, ``mlp.experts.gate_up_proj``.
        layers: How many there are.
        weights: Their numbers, together.
        share: Of all weights of the tower's blocks; vectors (biases, norms) do not count.
        state: ``adapted``; ``not chosen``: a target that ``target_modules`` leaves out; ``frozen``: of a kind that no
            family adapts (cross-attention, routers, convolutions, embeddings); ``left out``: weights that would be
            adapted if they could be; ``other blocks``: a list of blocks of no tower that is adapted.
    """

    tower: str
    kind: str
    layers: int
    weights: int
    share: float
    state: State


class Targets(list[Target]):
    """A list of targets that prints as a table of what is adapted and what is not.

    Examples:
        >>> from torch import nn
        >>> import keeplora
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 2))
        >>> config = keeplora.KeepLoraConfig(r=2, target_modules=["0", "2"])
        >>> keeplora.KeepLora(model, config).targets
        2 targets, 89% of the weights of their towers' blocks
        tower  kind  layers  weights  share
        model  0          1       32    44%  adapted
        model  2          1       32    44%  adapted
        model  3          1        8    11%  not chosen
    """

    def __init__(self, targets: Iterable[Target], kinds: Sequence[WeightKind] = ()):
        super().__init__(targets)
        self.kinds = tuple(kinds)

    @property
    def share(self) -> float:
        """Of the weights of the adapted towers' blocks."""
        here = [kind for kind in self.kinds if kind.state != "other blocks"]
        return sum(k.weights for k in here if k.state == "adapted") / max(1, sum(k.weights for k in here))

    def __repr__(self) -> str:
        rows = [["tower", "kind", "layers", "weights", "share", ""]]
        for kind in self.kinds:
            numbers = [str(kind.layers), f"{kind.weights:,}", _percent(kind.share)]
            rows.append([kind.tower, kind.kind, *numbers, kind.state])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{len(self)} targets, {_percent(self.share)} of the weights of their towers' blocks"]
        for tower, name, *numbers, state in rows:
            right = (number.rjust(width) for number, width in zip(numbers, widths[2:], strict=False))
            lines.append("  ".join([tower.ljust(widths[0]), name.ljust(widths[1]), *right, state]).rstrip())
        return "\n".join(lines)

    __str__ = __repr__


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


class _Weight(NamedTuple):
    """One weight of a model: where it stands, how large it is, what becomes of it."""

    stack: str
    tower: str | None
    kind: str
    size: int
    state: State


def coverage(model: nn.Module, chosen: Sequence[Target], targets: Sequence[Target]) -> Targets:
    """``chosen``, with what they are of the weights of their towers' blocks.

    Args:
        targets: What could be chosen of.
    """
    weights = list(_weights(model, chosen, targets))
    tower_of = {weight.stack: weight.tower for weight in weights if weight.tower is not None}
    parents = {stack.rpartition(".")[0]: tower for stack, tower in tower_of.items() if "." in stack or stack}
    groups: dict[tuple[str, str, State], list[int]] = {}
    for weight in weights:
        tower, state, kind = tower_of.get(weight.stack), weight.state, weight.kind
        if tower is None:
            tower = parents.get(weight.stack.rpartition(".")[0])  # a list beside that of a tower: a part of it
            name = weight.stack.rpartition(".")[2]
            if tower is None:
                tower, kind, state = weight.stack, "", "other blocks"
            else:
                kind = name
        groups.setdefault((tower, kind, state), []).append(weight.size)
    totals: dict[str, int] = {}
    for (tower, _, _), sizes in groups.items():
        totals[tower] = totals.get(tower, 0) + sum(sizes)
    kinds = [
        WeightKind(tower, kind, len(sizes), sum(sizes), sum(sizes) / max(1, totals[tower]), state)
        for (tower, kind, state), sizes in groups.items()
    ]
    return Targets(chosen, sorted(kinds, key=lambda kind: kind.state == "other blocks"))


def warn_of_left_out(
    function: str,
    model: nn.Module,
    targets: Targets,
    among: Sequence[Target],
    names: Sequence[str] | str,
    towers: Sequence[str] | None = None,
) -> None:
    """Say what share of the weights ``target_modules`` means and does not reach, or which blocks it passes over.

    Args:
        among: What ``targets`` were chosen of.
        names: By which names.
        towers: Those that were asked for, if any were.
    """
    names = [names] if isinstance(names, str) else list(names)
    if towers is None:
        _warn_of_stacks(function, model, targets, names)
    if names == ["all-linear"]:
        left: dict[str, list[WeightKind]] = {}
        for kind in targets.kinds:
            if kind.state == "left out":
                left.setdefault(kind.tower, []).append(kind)
        for tower, kinds in left.items():
            share = sum(kind.share for kind in kinds)
            if share >= TOLD_FROM:
                largest = [kind.kind for kind in sorted(kinds, key=lambda kind: -kind.weights)]
                warn(
                    f"{function}: {_percent(share)} of the weights in the blocks of tower {tower!r} are not adapted: "
                    f"there are adapters for nn.Linear layers and known experts, and none for {listed(largest)}. These "
                    "weights stay as they are; print(keeper.targets) shows all shares."
                )
    elif not any(part.isdigit() for name in names for part in name.split(".")):
        chosen = _blocks(model, targets)
        for stack, blocks in _blocks(model, among).items():
            passed = [block for block in blocks if block not in chosen.get(stack, ())]
            if passed and stack in chosen:
                warn(
                    f"{function}: {len(passed)} of {len(blocks)} blocks of {stack} have no weight named by "
                    f"target_modules and are not adapted: {listed(passed)}. Name more modules, or all with "
                    '"all-linear".'
                )


def _warn_of_stacks(function: str, model: nn.Module, targets: Targets, names: Sequence[str]) -> None:
    """Say which other stacks of blocks hold layers that ``names`` mean, and stand there by nobody's choice."""
    if any(word.isdigit() for name in names for word in name.split(".")):  # some blocks were asked for
        return
    stacks = [
        kind
        for kind in targets.kinds
        if kind.state == "other blocks" and not _BY_DESIGN.search(f".{kind.tower}") and _means(names, model, kind.tower)
    ]
    share = sum(kind.weights for kind in stacks) / max(1, sum(kind.weights for kind in targets.kinds))
    if share >= TOLD_FROM:
        listing = listed([kind.tower for kind in sorted(stacks, key=lambda kind: -kind.weights)])
        warn(
            f"{function}: {_percent(share)} of the weights in the model's blocks are in stacks of no known tower and "
            f"are not adapted: {listing}. To adapt them pass targets=, a list with those of "
            "keeplora.lora.linear_targets(model) that you want; with targets=keeplora.find_targets(model) they stay as "
            "they are, and nothing is said."
        )


_BY_DESIGN = re.compile(
    r"vision|visual|video|audio|speech|\.image_|img_|qformer|resampler|perceiver|project|connector"
    r"|\.text_decoder\.(resblocks|cross_attn)$"
)
"""Stacks that stay as they are unless asked for: other towers, what stands between them, and CoCa's text decoder."""


def _means(names: Sequence[str], model: nn.Module, stack: str) -> bool:
    """Whether one of ``names`` means a linear layer of the blocks of a list; a list of layers is none of blocks."""
    blocks = model.get_submodule(stack)
    layers = [target for target in linear_targets(blocks) if "." in target.name and not by_design(target.name)]
    for name in names:
        with contextlib.suppress(ValueError):
            return bool(select_targets(layers, [name]))
    return False


def _blocks(model: nn.Module, targets: Sequence[Target]) -> dict[str, list[str]]:
    """By list, the blocks that hold targets."""
    lists, blocks = set(outermost_lists(model)), dict[str, dict[str, None]]()
    for target in targets:
        stack = _within(target.name, lists)
        if stack:
            index = target.name.removeprefix(f"{stack}.").split(".")[0]
            blocks.setdefault(stack, {})[f"{stack}.{index}"] = None
    return {stack: list(names) for stack, names in blocks.items()}


def _weights(model: nn.Module, chosen: Sequence[Target], targets: Sequence[Target]) -> Iterator[_Weight]:
    """Every matrix of the model's lists of blocks, and of whatever else holds targets."""
    modules = dict(model.named_modules())
    known: dict[tuple[str, str], list[Target]] = {}
    for target in [*targets, *chosen]:
        mine = known.setdefault((target.module, target.parameter), [])
        mine += [target] if target not in mine else []
    lists = {path for path, blocks in outermost_lists(model).items() if path}
    stacks = lists | {_sequence(target, modules) for target in targets if _within(target.name, lists) is None}
    taken = {target.name for target in chosen}
    for path, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            stack = _within(f"{path}.{name}".lstrip("."), stacks)
            mine = known.get((path, name), [])
            shape = layer_shape(module, parameter)
            if stack is None or (parameter.dim() < 2 and not mine):
                continue
            if not mine:
                if parameter.dim() == 2 and expert_layout(module) is not None:  # a bias for each expert
                    continue
                frozen = by_design(f"{path}.{name}") or isinstance(module, _FROZEN)
                kind = _kind(f"{path}.{name}", stack)
                yield _Weight(stack, None, kind, math.prod(shape), "frozen" if frozen else "left out")
            for target in mine:
                rows = shape[0] if target.rows is None else target.rows[1] - target.rows[0]
                rows = rows if target.expert is None else 1
                size = rows * math.prod(shape[1:])
                state: State = "adapted" if target.name in taken else "not chosen"
                yield _Weight(stack, target.tower, _kind(target.name, stack), size, state)


def _within(name: str, stacks: Iterable[str]) -> str | None:
    return next((stack for stack in stacks if not stack or name.startswith(f"{stack}.")), None)


def _sequence(target: Target, modules: dict[str, nn.Module]) -> str:
    """The outermost ``nn.Sequential`` around a target; the model itself where there is none."""
    parts = target.name.split(".")
    paths = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((path for path in paths if isinstance(modules.get(path), nn.Sequential)), "")


def _kind(name: str, stack: str) -> str:
    """A name inside a block: without the way to the block, without numbers, and without ``weight``."""
    inner = name.removeprefix(f"{stack}.") if stack else name
    words = [part for part in inner.split(".") if not part.isdigit()]
    if len(words) > 1 and words[-1] == "weight":
        words.pop()
    return ".".join(words) or inner
