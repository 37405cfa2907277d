"""Which weights are adapted: one flat list of targets, chosen by the names PEFT users know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from keeplora._messages import nearest

from .mixture import expert_layout

__all__ = [
    "Target",
    "depth_factor",
    "depth_positions",
    "expert_targets",
    "linear_targets",
    "select_targets",
    "target_shape",
]


@dataclass(frozen=True)
class Target:
    """One weight matrix that gets an adapter.

    Attributes:
        name: Unique dotted name, as in transformers: ``visual.transformer.resblocks.0.attn.q_proj``.
        module: Dotted path of the ``nn.Linear``, ``nn.MultiheadAttention`` or experts that own the weight.
        parameter: The weight's name in that module: ``weight``, ``in_proj_weight``, ``q_proj_weight`` …
        rows: ``(start, stop)`` of a fused weight, or None for the whole matrix.
        depth: Index of the block inside its tower, shallowest first.
        tower: ``vision``, ``text``, ``language``, or ``model`` where a model has no towers.
        expert: Of a weight of three dimensions the expert whose slice it is, as ``[out, in]``; else None.
    """

    name: str
    module: str
    parameter: str
    rows: tuple[int, int] | None
    depth: int
    tower: str
    expert: int | None = None


def linear_targets(model: nn.Module) -> list[Target]:
    """Every ``nn.Linear`` of ``model``, in order of definition: tower ``model``, depth = position in the list.

    The finder for models no integration knows. ``nn.MultiheadAttention`` gives q, k, v and out_proj, and experts in
    weights of three dimensions one target each (``expert_targets``), all of a module at one depth.

    Examples:
        >>> from torch import nn
        >>> [t.name for t in linear_targets(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))]
        ['0', '2']
    """
    targets: list[Target] = []
    attention: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(parent + ".") for parent in attention):
            continue
        depth = 1 + max((target.depth for target in targets), default=-1)
        if isinstance(module, nn.MultiheadAttention):
            attention.append(path)
            targets += attention_targets(path, module, depth, "model")
        elif isinstance(module, nn.Linear):
            targets.append(Target(path, path, "weight", None, depth, "model"))
        else:
            targets += expert_targets(path, module, depth, "model")
    return targets


def expert_targets(path: str, module: nn.Module, depth: int, tower: str) -> list[Target]:
    """A target for every expert of every weight: ``mlp.experts.3.gate_up_proj``; none where there are no experts.

    Args:
        path: Where ``module`` stands.
        depth: Of all of its targets.
        tower: Of all of its targets.

    Examples:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> module = MixtralExperts(MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=2))
        >>> [target.name for target in expert_targets("mlp.experts", module, 0, "language")][:2]
        ['mlp.experts.0.gate_up_proj', 'mlp.experts.1.gate_up_proj']
    """
    layout = expert_layout(module)
    if layout is None:
        return []
    return [
        Target(f"{path}.{expert}.{name}".lstrip("."), path, name, None, depth, tower, expert)
        for name in layout.parameters
        for expert in range(len(module.get_parameter(name)))
    ]


def target_shape(model: nn.Module, target: Target) -> tuple[int, int] | None:
    """``(out, in)`` of a target; None where the model has no such weight.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8))
        >>> target_shape(model, linear_targets(model)[0])
        (8, 4)
    """
    try:
        module = model.get_submodule(target.module)
    except AttributeError:
        return None
    weight = module._parameters.get(target.parameter)
    if weight is None or weight.dim() < 2:
        return None
    layout = expert_layout(module)
    if target.expert is not None and layout is not None:
        out, width = layout.slice(weight, 0).shape
        return out, width
    out, width = weight.shape[:2]
    if isinstance(module, nn.Linear):  # whose weight may be packed
        out, width = module.out_features, module.in_features
    return (out if target.rows is None else target.rows[1] - target.rows[0]), width


def attention_targets(path: str, module: nn.MultiheadAttention, depth: int, tower: str) -> list[Target]:
    """The four targets of an ``nn.MultiheadAttention``: row ranges of a fused weight, or separate weights."""
    width = module.embed_dim
    targets = []
    for i, letter in enumerate("qkv"):
        if module.in_proj_weight is not None:
            parameter, rows = "in_proj_weight", (i * width, (i + 1) * width)
        else:
            parameter, rows = f"{letter}_proj_weight", None
        targets.append(Target(f"{path}.{letter}_proj", path, parameter, rows, depth, tower))
    targets.append(Target(f"{path}.out_proj", f"{path}.out_proj", "weight", None, depth, tower))
    return targets


def select_targets(targets: Sequence[Target], names: Iterable[str] | str) -> list[Target]:
    """The targets that ``names`` mean, in the order of ``targets``.

    A name matches a target if it is a run of whole dotted components of the target's name: ``attn`` takes
    q, k, v and out_proj of every block, ``q_proj`` every query, ``visual.transformer`` one tower,
    ``resblocks.0.attn.q_proj`` one matrix per tower. ``"attn"`` alone also stands for what other libraries call their
    attention: ``self_attn``, ``linear_attn``, ``attention``, ``SelfAttention``. ``"all-linear"`` takes everything.

    Raises:
        ValueError: a name matches nothing (the nearest names are offered), or ``targets`` is empty.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    if not targets:
        raise ValueError(
            "select_targets: targets must not be empty, got a model without any linear layer: adapters need an "
            "nn.Linear or nn.MultiheadAttention. Replace layers of your own by those, or adapt another model."
        )
    if not wanted:
        raise ValueError(
            "select_targets: target_modules must name at least one module, got an empty list. "
            'Use "all-linear" for every linear layer.'
        )
    if wanted == ["all-linear"]:
        return list(targets)
    dotted = [f".{target.name}." for target in targets]
    chosen: set[int] = set()
    for name in wanted:
        known_as = _ATTENTION if name == "attn" else (name,)
        hits = [i for i, full in enumerate(dotted) if any(f".{alias}." in full for alias in known_as)]
        if not hits:
            known = sorted({part for target in targets for part in _suffixes(target.name)} - {""})
            near = f"Nearest names: {', '.join(nearest(name, known))}." if known else 'To take all: "all-linear".'
            raise ValueError(
                f"select_targets: target_modules must name modules of the model, got {name!r}, which "
                f"matches none of {len(targets)} linear layers. {near}"
            )
        chosen.update(hits)
    return [target for i, target in enumerate(targets) if i in chosen]


_ATTENTION = ("attn", "self_attn", "linear_attn", "attention", "SelfAttention")


def _suffixes(name: str) -> list[str]:
    parts = [part for part in name.split(".") if not part.isdigit()]
    return [*parts, ".".join(parts[-2:])]


def depth_positions(targets: Sequence[Target]) -> dict[str, tuple[int, int]]:
    """``{target name: (l, L)}``: the position l = 0 … L − 1 of its block among the adapted blocks of its tower.

    Examples:
        >>> blocks = [Target(f"b{i}.fc", f"b{i}.fc", "weight", None, i, "vision") for i in (2, 5, 9)]
        >>> depth_positions(blocks)
        {'b2.fc': (0, 3), 'b5.fc': (1, 3), 'b9.fc': (2, 3)}
    """
    depths: dict[str, list[int]] = {}
    for target in targets:
        depths.setdefault(target.tower, []).append(target.depth)
    ranks = {tower: {d: i for i, d in enumerate(sorted(set(all_)))} for tower, all_ in depths.items()}
    return {t.name: (ranks[t.tower][t.depth], len(ranks[t.tower])) for t in targets}


def depth_factor(gamma: float, position: int, count: int) -> float:
    """λ_l = γ + (1 − γ) l/(L − 1) for l = ``position`` of L = ``count`` blocks; 1 for a single block.

    Examples:
        >>> [round(depth_factor(0.2, l, 5), 3) for l in (0, 2, 4)]
        [0.2, 0.6, 1.0]
    """
    return 1.0 if count <= 1 else gamma + (1.0 - gamma) * position / (count - 1)
