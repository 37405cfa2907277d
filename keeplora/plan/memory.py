r"""Bytes at every moment of a task's life: the memory model, all of it.

With ``Σ`` over adapted weights ``[out, in]``, r directions of adapters, k of a basis, and b bytes per weight:

=================== ==================================================================================================
on the device
adapters            ``4 Σ r (in + out)``, float32
optimizer           ``12 Σ r·out``: B's gradient and AdamW's two moments
gradients           ``4 Σ out·in`` in a pass before a task, or ``4 Σ min(out, 8 r)·in`` sketched
feature moments     ``4 Σ in²`` over distinct inputs, in the passes after a task, at most ``memory_budget`` together
workspace           what the factorisation of the largest weight takes alone
in main memory
bases               ``4 Σ in·k``, float32
pretrained weights  ``b Σ out·in`` from the first merge into 16-bit weights on
updates             ``4 Σ r (in + out)`` for every task; ``4 out·in`` of a weight where that is less
on disk             bases and updates; adapters of an open task
=================== ==================================================================================================

What a method keeps between tasks follows ``keeplora.methods.keeplora.footprint.Footprint``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from keeplora.methods.keeplora.footprint import Footprint, LayerShape
from keeplora.methods.settings import ConfigError

from .shapes import Matrix, Shapes

__all__ = ["METHODS", "Moment", "Setting", "memory", "parts"]

METHODS = ("keeplora", "keeplora++", "lora")
"""Methods that the model of memory is written for."""

WEIGHT_SHARE = (0.13, 0.30)
"""k / in of a weight's basis at ε_w 0.6: of falling spectra (bench/results/cpu/shapes_7b.json: 0.08 to 0.17) and of
flat ones (randomly initialised Llama blocks: 0.96 bytes of basis per weight)."""
FEATURE_SHARE = 0.015
"""Directions that a task adds, as a share of in (bench/results/cpu/shapes_7b.json: 0.006 to 0.015)."""
WORDS = 10
"""Bytes for every token and word of the vocabulary: logits in 16 bits, in float32, and the gradient of these."""


@dataclass(frozen=True)
class Setting:
    """What decides about memory besides the model.

    Attributes:
        rank: r. method: One of ``METHODS``. weight_bytes: Bytes of a weight: 2 or 4. batch, length: Of a step, per
            GPU. gpus: With more than one, weights are sharded among them (FSDP2). tasks: That were learned before.
        budget: ``memory_budget`` of the settings, in bytes; None: gradients are kept exactly.
            (``keeplora.plan.plan`` takes 20 % of what the model leaves free, as the method does.)
        weight_share: k / in that weights protect. feature_share: that every task adds. ranks: k by name, where known.
    """

    rank: int = 16
    method: str = "keeplora++"
    weight_bytes: int = 2
    batch: int = 1
    length: int = 1024
    gpus: int = 1
    tasks: int = 0
    budget: int | None = None
    weight_share: float = WEIGHT_SHARE[1]
    feature_share: float = FEATURE_SHARE
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"plan: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("rank", "batch", "length", "gpus"):
            if getattr(self, name) < 1:
                raise ConfigError(f"plan: {name} must be a whole number >= 1, got {getattr(self, name)}")
        for name in ("weight_share", "feature_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"plan: {name} must lie in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class Moment:
    """One moment: bytes by part on one GPU, on its host, and on disk."""

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)
    disk: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self.device.values())


def rank_of(matrix: Matrix, setting: Setting, tasks: int) -> int:
    """k of a matrix's basis after so many tasks."""
    share = setting.weight_share + tasks * setting.feature_share
    return setting.ranks.get(matrix.name, min(matrix.width, round(share * matrix.width)))


def footprint(shapes: Shapes, setting: Setting) -> Footprint:
    """What the method keeps of the adapted weights, after ``setting.tasks`` tasks."""
    protects = setting.method != "lora"
    return Footprint(
        [
            LayerShape(
                m.rows, m.width, min(setting.rank, m.width), protects * rank_of(m, setting, setting.tasks),
                dtype_bytes=setting.weight_bytes,
            )
            for m in shapes.adapted
        ]
    )  # fmt: skip


def parts(shapes: Shapes, setting: Setting) -> dict[str, int]:
    """Bytes of every kind of tensor, of the whole model; ``bases`` and ``updates`` after ``tasks`` tasks."""
    weights, r, kept = shapes.adapted, setting.rank, footprint(shapes, setting)
    protects = setting.method != "lora"
    exact = 4 * sum(m.numel for m in weights)
    sketched = 4 * sum(min(m.rows, 8 * r) * m.width for m in weights)
    moments = 4 * sum(width * width for width in shapes.inputs())
    adapters = kept.open_task()
    return {
        "model": setting.weight_bytes * shapes.parameters,
        "adapters": adapters,
        "optimizer": kept.training() - adapters + sum(4 * layer.rank * layer.out for layer in kept.layers),
        "bases": sum(layer.bases(0) for layer in kept.layers),
        "pretrained weights": sum(setting.weight_bytes * m.numel for m in weights) if setting.weight_bytes < 4 else 0,
        "updates": sum(layer.history(setting.tasks) for layer in kept.layers),
        "one more update": sum(layer.history(setting.tasks + 1) for layer in kept.layers),
        "gradients": protects * (exact if setting.budget is None or exact <= setting.budget else sketched),
        "moments": protects * (moments if setting.budget is None else min(moments, setting.budget)),
        "workspace": protects * max((kept.workspace(layer) for layer in kept.layers), default=0),
    }


def memory(shapes: Shapes, setting: Setting, activations: int = 0) -> list[Moment]:
    """The moments of a task after ``setting.tasks`` others, on one of ``setting.gpus`` GPUs.

    Sharded weights are divided by the number of GPUs; two blocks are gathered at a time. Adapters and statistics are on
    all of them, and every process keeps bases and updates in its host's memory.

    Args:
        activations: What a training step keeps for backward, in bytes (``activations``).
    """
    of, n = parts(shapes, setting), setting.gpus
    gathered = 0 if n == 1 else 2 * of["model"] // max(1, shapes.blocks)
    held = {"model": of["model"] // n + gathered}
    pretrained = {"pretrained weights": of["pretrained weights"] // n}
    bases = {"bases": of["bases"]} if of["bases"] else {}
    before = {**bases, **pretrained, "updates": of["updates"]} if setting.tasks else {}
    opened = {**before, **bases}
    after = {**bases, **pretrained, "updates": of["one more update"]}
    moments = [Moment("wrapped", held, before)]
    protects = setting.method != "lora"
    if protects:
        passes = {"gradients": of["gradients"], "activations": activations}
        work = {"gradients": of["gradients"], "workspace": of["workspace"]}
        moments.append(Moment("before_task", {**held, **(passes if activations > of["workspace"] else work)}, opened))
    training = {"adapters": of["adapters"], "optimizer": of["optimizer"]}
    moments.append(Moment("training", {**held, **training, "activations": activations}, opened))
    closing = {"moments": of["moments"], "workspace": of["workspace"]} if protects else {}
    moments.append(Moment("after_task", {**held, **training, **closing}, after))
    moments.append(Moment("between tasks", held, after))
    moments.append(Moment("save", held, after, disk={**bases, "updates": of["one more update"]}))
    return moments
