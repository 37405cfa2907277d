r"""Bytes at every moment of a task's life: the memory model, all of it.

With ``Σ`` over adapted weights ``[out, in]``, r directions of adapters, k of a basis, and b bytes per weight:

=================== ==================================================================================================
bases               ``4 Σ in·k`` on the device, float32
adapters            ``4 Σ r (in + out)``, float32
optimizer           ``12 Σ r·out``: B's gradient and AdamW's two moments
gradients           ``4 Σ out·in`` in a pass before a task, or ``4 Σ min(out, 8 r)·in`` sketched
feature moments     ``4 Σ in²`` over distinct inputs, in the pass after a task
masters             ``4 Σ out·in`` after the first merge into 16-bit weights
merged updates      ``4 Σ r (in + out)`` for every task, on the host
state               ``4 Σ out·in`` exact weights, bases, merged updates, and adapters of an open task
=================== ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
WORKSPACE = 5.5
"""Float32 copies of the largest matrix that one factorisation takes (bench/results/cpu/shapes_7b.json: 0.8 to 5.5)."""
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


def parts(shapes: Shapes, setting: Setting) -> dict[str, int]:
    """Bytes of every kind of tensor, of the whole model on one GPU; ``bases`` after ``tasks`` tasks."""
    weights, r = shapes.adapted, setting.rank
    ranks = [min(r, m.width) for m in weights]
    protects = setting.method != "lora"
    exact = 4 * sum(m.numel for m in weights)
    sketched = 4 * sum(min(m.rows, 8 * r) * m.width for m in weights)
    return {
        "model": setting.weight_bytes * shapes.parameters,
        "adapters": 4 * sum(k * (m.rows + m.width) for k, m in zip(ranks, weights, strict=True)),
        "optimizer": 12 * sum(k * m.rows for k, m in zip(ranks, weights, strict=True)),
        "bases": protects * 4 * sum(m.width * rank_of(m, setting, setting.tasks) for m in weights),
        "gradients": protects * (exact if setting.budget is None or exact <= setting.budget else sketched),
        "moments": protects * 4 * sum(width * width for width in shapes.inputs()),
        "masters": exact if setting.weight_bytes < 4 else 0,
        "exact weights": exact,
        "workspace": protects * round(WORKSPACE * 4 * max((m.numel for m in weights), default=0)),
    }


def memory(shapes: Shapes, setting: Setting, activations: int = 0) -> list[Moment]:
    """The moments of a task after ``setting.tasks`` others, on one of ``setting.gpus`` GPUs.

    Sharded weights, and what follows their rows, are divided by the number of GPUs; two blocks are gathered at a time.
    Adapters, bases and statistics are on all of them.

    Args:
        activations: What a training step keeps for backward, in bytes (``activations``).
    """
    of, n = parts(shapes, setting), setting.gpus
    gathered = 0 if n == 1 else 2 * of["model"] // max(1, shapes.blocks)
    held = {"model": of["model"] // n + gathered}
    if setting.tasks:
        held["masters"] = of["masters"] // n
    learned = setting.tasks * of["adapters"]
    before = {"bases": of["bases"]} if of["bases"] else {}
    opened = {**before, "adapters": of["adapters"]}
    after = {**held, "masters": of["masters"] // n}
    protects = of["bases"] > 0 or setting.method != "lora"
    moments = [Moment("wrapped", {**held, **before} if setting.tasks else held, {"merged updates": learned})]
    if protects:
        passes = {"gradients": of["gradients"], "activations": activations}
        work = {"gradients": of["gradients"], "workspace": of["workspace"]}
        worst = passes if activations > of["workspace"] else work
        moments.append(Moment("before_task", {**held, **before, **worst}))
    moments.append(Moment("training", {**held, **opened, "optimizer": of["optimizer"], "activations": activations}))
    merging = {"moments": of["moments"], "workspace": of["workspace"]} if protects else {}
    moments.append(Moment("after_task", {**after, **opened, "optimizer": of["optimizer"], **merging}))
    moments.append(Moment("between tasks", {**after, **before}, {"merged updates": learned + of["adapters"]}))
    saved = {"exact weights": of["exact weights"], "bases": of["bases"], "merged updates": learned + of["adapters"]}
    moments.append(Moment("save", {**after, **before}, disk=saved))
    return moments
