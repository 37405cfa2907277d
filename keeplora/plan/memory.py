r"""Bytes at every moment of a task's life: the memory model, all of it.

With ``Σ`` over adapted weights ``[out, in]``, r directions of adapters, k of a basis, and b bytes per weight; adapted
weights may be quantised, to 9/16 bytes (NF4 with a float32 scale for 64 numbers) or to one and a scale for a row:

=================== ==================================================================================================
on the device
adapters            ``4 Σ r (in + out)``, float32
optimizer           ``12 Σ r·out``: B's gradient and AdamW's two moments
gradients           ``4 Σ out·in`` in a pass before a task, or ``4 Σ min(out, 8 r)·in`` sketched
dequantised weight  2 bytes for each number of the largest one, in every pass and step
updates beside      of quantised weights, and with ``merge=False``: ``b t Σ r (in + out)`` after t tasks, at most
weights             ``b Σ out·in``; merged otherwise
feature moments     ``4 Σ in²`` over distinct inputs, in the passes after a task, at most ``memory_budget`` together
workspace           what the work on the largest weight takes alone (``Footprint.opening``, ``closing``,
                    ``LayerShape.seek_work``)
in main memory
bases               ``2 Σ in·k`` of 16-bit weights, float16, and ``4 Σ in·k`` of tasks, float32; all in float32 else
pretrained weights  ``b Σ out·in`` from the first merge into 16-bit weights on; none where nothing is merged
updates             ``4 Σ r (in + out)`` for every task; ``4 out·in`` of a weight where that is less
on disk             bases and updates; adapters of an open task
=================== ==================================================================================================

What a method keeps, and what the work on one layer takes, is ``keeplora.methods.keeplora.footprint.Footprint``. The
model, statistics and activations are added here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from keeplora.methods.keeplora.footprint import Footprint, LayerShape
from keeplora.methods.settings import ConfigError, Settings

from .shapes import Matrix, Shapes

__all__ = ["METHODS", "Moment", "Setting", "memory", "parts"]

METHODS = ("keeplora", "keeplora++", "lora")
"""Methods that the model of memory is written for."""

WEIGHT_SHARE = (0.13, 0.30)
"""k / in of a weight's basis at ε_w 0.6: of falling spectra (bench/results/cpu/shapes_7b.json: 0.08 to 0.17) and of
flat ones (randomly initialised Llama blocks: 0.96 bytes of basis per weight)."""
FEATURE_SHARE = 0.015
"""Directions that a task adds, as a share of in (bench/results/cpu/shapes_7b.json: 0.006 to 0.015)."""
BITS = (4, 8)
WORDS = 10
"""Bytes for every token and word of the vocabulary: logits in 16 bits, in float32, and the gradient of these."""


@dataclass(frozen=True)
class Setting(Settings):
    """What decides about memory besides the model.

    Attributes:
        rank: r. method: One of ``METHODS``. weight_bytes: Bytes of a weight: 2 or 4. bits: Of an adapted weight where
            it is quantised: 4 or 8, else None. merge: Whether updates are merged. batch, length: Of a step, per GPU.
        gpus: With more than one, weights are sharded among them (FSDP2). tasks: That were learned before.
        budget: ``memory_budget`` of the settings, in bytes; None: gradients are kept exactly.
            (``keeplora.plan.plan`` takes 20 % of what the model leaves free, as the method does.)
        weight_share: k / in that weights protect. feature_share: that every task adds. ranks: k by name, where known:
            of the weight, and of all tasks until now.
        whole_spectra: Whether subspace iteration gives up on the moments of wide layers, as on flat spectra.
    """

    rank: int = 16
    method: str = "keeplora++"
    weight_bytes: int = 2
    bits: int | None = None
    merge: bool = True
    batch: int = 1
    length: int = 1024
    gpus: int = 1
    tasks: int = 0
    budget: int | None = None
    weight_share: float = WEIGHT_SHARE[1]
    feature_share: float = FEATURE_SHARE
    ranks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    whole_spectra: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"plan: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.bits not in (None, *BITS):
            raise ConfigError(f"plan: bits must be 4 or 8, or none for weights as they are, got {self.bits}")
        if self.bits and (self.gpus > 1 or self.weight_bytes != 2):
            got = f"{self.gpus} GPUs" if self.gpus > 1 else "a model in float32"
            raise ConfigError(f"plan: bits must be for one GPU and a model in 16 bits, got {got} and {self.bits} bits")
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


def footprint(shapes: Shapes, setting: Setting) -> Footprint:
    """What the method keeps of the adapted weights."""
    beside = setting.bits is not None or not setting.merge
    return Footprint([_layer(m, setting) for m in shapes.adapted], kept=setting.weight_bytes if beside else 0)


def stored(m: Matrix, setting: Setting) -> int:
    """Bytes of an adapted weight."""
    if setting.bits is None:
        return setting.weight_bytes * m.numel
    return m.numel // 2 + 4 * -(-m.numel // 64) if setting.bits == 4 else m.numel + 4 * m.rows


def _layer(m: Matrix, setting: Setting) -> LayerShape:
    rank, known = min(setting.rank, m.width), setting.ranks.get(m.name)
    if setting.method == "lora":
        protected, added, already = 0, 0, 0
    elif known is not None:
        (protected, already), added = known, 0
    else:
        protected, added = (round(share * m.width) for share in (setting.weight_share, setting.feature_share))
        already = 0
    return LayerShape(m.rows, m.width, rank, protected, added, already, setting.weight_bytes)


def parts(shapes: Shapes, setting: Setting) -> dict[str, int]:
    """Bytes of every kind of tensor that a pass or a step works with, of the whole model."""
    weights, r, kept = shapes.adapted, setting.rank, footprint(shapes, setting)
    protects = setting.method != "lora"
    exact = 4 * sum(m.numel for m in weights)
    sketched = 4 * sum(min(m.rows, 8 * r) * m.width for m in weights)
    moments = 4 * sum(width * width for width in shapes.inputs())
    adapters = kept.open_task()
    return {
        "model": setting.weight_bytes * (shapes.parameters - sum(m.numel for m in weights))
        + sum(stored(m, setting) for m in weights),
        "adapters": adapters,
        "optimizer": kept.training() - adapters + kept.gradients(),
        "dequantised": 2 * max((m.numel for m in weights), default=0) if setting.bits else 0,
        "gradients": protects * (exact if setting.budget is None or exact <= setting.budget else sketched),
        "moments": protects * moments,
    }


def memory(shapes: Shapes, setting: Setting, activations: int = 0) -> list[Moment]:
    """The moments of a task after ``setting.tasks`` others, on one of ``setting.gpus`` GPUs.

    Sharded weights are divided by the number of GPUs; two blocks are gathered at a time. Adapters and statistics are on
    all of them, and every process keeps bases and updates in its host's memory.

    Args:
        activations: What a training step keeps for backward, in bytes (``activations``).
    """
    of, kept, n, tasks = parts(shapes, setting), footprint(shapes, setting), setting.gpus, setting.tasks
    gathered = 0 if n == 1 else 2 * of["model"] // max(1, shapes.blocks)
    model = {"model": of["model"] // n + gathered}
    held = model | _some("updates beside weights", kept.beside(tasks))
    reads = _some("dequantised weight", of["dequantised"])

    def host(learned: int, opened: bool) -> dict[str, int]:
        bases = {"bases": kept.bases(learned)} if opened and kept.bases(learned) else {}
        starts = {} if kept.kept else {"pretrained weights": kept.starts(learned) // n}
        return {**bases, **(starts | {"updates": kept.updates(learned)} if learned else {})}

    before, opened, after = host(tasks, tasks > 0), host(tasks, True), host(tasks + 1, True)
    moments = [Moment("wrapped", held, before)]
    protects = setting.method != "lora"
    if protects:
        sketched = of["gradients"] < 4 * sum(m.numel for m in shapes.adapted)
        rows = (min(x.out, 8 * x.rank) if sketched else x.out for x in kept.layers)
        seeking = max((x.seek_work(n, tasks) for x, n in zip(kept.layers, rows, strict=True)), default=0)
        work = max(seeking, 0 if tasks else kept.opening())
        largest = max((setting.weight_bytes * m.numel for m in shapes.adapted), default=0)  # its gradient in a batch
        running = activations + largest
        name, size = ("activations", running) if running > work else ("workspace", work)
        moments.append(Moment("before_task", {**held, **reads, "gradients": of["gradients"], name: size}, opened))
    training = {"adapters": of["adapters"], "optimizer": of["optimizer"]}
    moments.append(Moment("training", {**held, **reads, **training, "activations": activations}, opened))
    closing = {}
    if protects:
        most = kept.closing(of["moments"], setting.budget, whole=setting.whole_spectra)
        there = min(of["moments"], most)
        closing = {"moments": there, "workspace": most - there}
    moments.append(Moment("after_task", {**held, **training, **closing}, after))
    held = model | _some("updates beside weights", kept.beside(tasks + 1))
    moments.append(Moment("between tasks", held, after))
    moments.append(Moment("save", held, after, disk=_disk(kept, tasks + 1)))
    return moments


def _some(name: str, size: int) -> dict[str, int]:
    return {name: size} if size else {}


def _disk(kept: Footprint, tasks: int) -> dict[str, int]:
    bases = kept.bases(tasks)
    rest = {"updates": kept.disk(tasks) - bases}
    return {"bases": bases, **rest} if bases else rest
