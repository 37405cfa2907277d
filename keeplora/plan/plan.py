"""The plan of a model: moments on one card and on several, beside PEFT's LoRA; what fits what, and with which batch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from keeplora._calls import named
from keeplora._messages import suggest
from keeplora.lora.forward import FORMED_AGAIN
from keeplora.methods.settings import ConfigError
from keeplora.statistics.budget import FREE_SHARE

from .activations import Kind, kept_by_block
from .memory import WEIGHT_SHARE, WORDS, Moment, Setting, memory, parts
from .seconds import GPUS, seconds
from .shapes import Shapes, shapes_of
from .wire import wire_bytes

__all__ = ["Plan", "plan"]

GB = 10**9
USABLE = 0.95
"""Of a card: the rest is the driver's and the allocator's."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_BEFORE = ("first task", "second task", "eighth task")
_TASKS = (0, 1, 7)


@dataclass(frozen=True)
class Plan:
    """Predictions for one model.

    Attributes:
        shapes, setting: What they are for.
        moments: By number of GPUs and of tasks before, the least and the most bytes of every moment on a GPU.
        peft: By number of GPUs, what stock PEFT's LoRA takes in training.
        fits: By number of GPUs and card (GB), the moment that does not fit, or None.
        batches: By number of GPUs and card, the largest batch of a later task, and PEFT's; powers of two, 0 for none.
        seconds: By phase, of a first task, on the named GPU. wire: Bytes that data-parallel processes exchange.
    """

    shapes: Shapes
    setting: Setting
    moments: Mapping[int, Mapping[int, tuple[list[Moment], list[Moment]]]]
    peft: Mapping[int, int]
    fits: Mapping[int, Mapping[int, str | None]]
    batches: Mapping[int, Mapping[int, tuple[int, int]]]
    seconds: Mapping[str, float]
    wire: Mapping[str, int]
    weight_share: tuple[float, float]
    gpu: str
    checkpointing: bool

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        rows = [
            {
                "gpus": gpus, "tasks_before": tasks, "moment": low.name,
                "device_bytes": [low.total, high.total], "device_parts": dict(high.device),
                "host_bytes": [sum(low.host.values()), sum(high.host.values())],
                "disk_bytes": [sum(low.disk.values()), sum(high.disk.values())],
            }
            for gpus, by_tasks in self.moments.items()
            for tasks, (lows, highs) in by_tasks.items()
            for low, high in zip(lows, highs, strict=True)
        ]  # fmt: skip
        return {
            "model": self.shapes.name, "parameters": self.shapes.parameters,
            "adapted": sum(m.numel for m in self.shapes.adapted), "predicted": True,
            "method": self.setting.method, "rank": self.setting.rank, "weight_bytes": self.setting.weight_bytes,
            "bits": self.setting.bits, "merge": self.setting.merge,
            "batch": self.setting.batch, "length": self.setting.length, "checkpointing": self.checkpointing,
            "weight_share": list(self.weight_share), "feature_share": self.setting.feature_share,
            "moments": rows, "peft_training_bytes": dict(self.peft),
            "does_not_fit": {g: dict(by_card) for g, by_card in self.fits.items()},
            "largest_batch": {
                g: {card: {"keeplora": own, "peft": peft} for card, (own, peft) in by_card.items()}
                for g, by_card in self.batches.items()
            },
            "gpu": self.gpu, "seconds": dict(self.seconds), "wire_bytes": dict(self.wire),
        }  # fmt: skip

    def __str__(self) -> str:
        s, shapes = self.setting, self.shapes
        adapted = sum(m.numel for m in shapes.adapted)
        low, high = self.weight_share
        lines = [
            f"{shapes.name}: {_parameters(shapes.parameters)} parameters, {_parameters(adapted)} in "
            f"{len(shapes.adapted)} adapted weights ({100 * adapted / shapes.parameters:.0f} %)",
            f"{s.method}, r {s.rank}, {_stored(s)}, steps of {s.batch} x {s.length} tokens per GPU"
            + (", checkpointing" if self.checkpointing else ""),
            "Predicted, not measured. GB are 10^9 bytes.",
            f"Bases are assumed to have {low:g} to {high:g} of a weight's width (--weight-share), and "
            f"{s.feature_share:g} more after every task. Statistics: as memory_budget chooses on the largest card.",
        ]
        for gpus, by_tasks in self.moments.items():
            where = "one GPU" if gpus == 1 else f"each of {gpus} GPUs, weights sharded (FSDP2: docs/scaling.md)"
            lines += ["", _row(f"GB on {where}", [""] * 3), _row("", _BEFORE)]
            names = [moment.name for moment in by_tasks[0][1]]
            for i, name in enumerate(names):
                if name == "save":
                    continue
                lines.append(_row(f"  {name}", [_span(lo[i].total, hi[i].total) for lo, hi in by_tasks.values()]))
            lines.append(
                _row(f"  training, PEFT {'QLoRA' if s.bits else 'LoRA'}", [_number(self.peft[gpus] / GB, 1)] * 3)
            )
            for card, moment in self.fits[gpus].items():
                own, peft = self.batches[gpus][card]
                told = "fits" if moment is None else f"does not fit ({moment})"
                lines.append(f"  {card} GB: {told}; largest batch in a later task {_batch(own)}, PEFT {_batch(peft)}")
        ends = [(lo[-1], hi[-1]) for lo, hi in self.moments[1].values()]
        lines += ["", _row("GB beside one GPU", _BEFORE)]
        lines.append(_row("  main memory", [_span(sum(a.host.values()), sum(b.host.values())) for a, b in ends]))
        lines.append(_row("  disk (save)", [_span(sum(a.disk.values()), sum(b.disk.values())) for a, b in ends]))
        lines += ["", f"seconds of a first task on one {self.gpu} (--batches in a pass, a step of --batch)"]
        lines += [f"  {phase:<28}{_number(value, 2):>12}" for phase, value in self.seconds.items()]
        lines.append("GB that data-parallel processes sum up in a task switch")
        lines += [f"  {phase:<28}{_number(value / GB, 2):>12}" for phase, value in self.wire.items()]
        return "\n".join(lines)


def _stored(setting: Setting) -> str:
    """How weights are, and what becomes of updates."""
    if setting.bits is None:
        return f"{setting.weight_bytes} bytes per weight" + ("" if setting.merge else ", updates kept beside weights")
    how = "NF4 with float32 scales" if setting.bits == 4 else "8 bits"
    return f"adapted weights in {how}, others in 16 bits, updates kept beside weights"


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<30}" + "".join(f"{cell:>18}" for cell in cells).rstrip()


def _batch(largest: int) -> str:
    return "none" if not largest else f"{largest} or more" if largest == BATCHES[-1] else str(largest)


def _span(low: int, high: int) -> str:
    least, most = _number(low / GB, 1), _number(high / GB, 1)
    return least if least == most else f"{least} - {most}"


def _number(value: float, digits: int) -> str:
    """With so many digits after the point; where they would all be zeros, two that are not."""
    return f"{value:.2g}" if 0 < value < 0.5 * 10**-digits else f"{value:.{digits}f}"


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2g} M"


@named
def plan(
    name: str | os.PathLike[str],
    setting: Setting | None = None,
    *,
    targets: Sequence[str] | str = "all-linear",
    cards: Sequence[int] = (24, 48, 80),
    gpu: str = "H100",
    batches: int = 100,
    weight_share: Sequence[float] | None = None,
    checkpointing: bool = False,
) -> Plan:
    """What a model will take: bytes and seconds of every phase, from its config.

    Args:
        name: Of ``keeplora.plan.MODELS``, a ``config.json``, a folder, or a model id.
        setting: ``gpus`` of it is shown beside one GPU.
        cards: Sizes in GB.
        gpu: Whose rates: a key of ``keeplora.plan.seconds.GPUS``.
        batches: Of a pass over a task's data.
        weight_share: One share of a weight's width that its basis has, or the least and the most.

    Raises:
        ConfigError: an unknown model, method or GPU; a number out of its range.
    """
    if gpu not in GPUS:
        raise ConfigError(f"plan: gpu must be one whose rates are known, got {gpu!r}{suggest(gpu, GPUS, listing=True)}")
    setting = setting or Setting(gpus=8)
    if setting.gpus > 1 and not setting.merge:
        raise ConfigError(
            f"plan: merge must be true where weights are sharded, got false for {setting.gpus} GPUs. Plan for one GPU"
        )
    shares = tuple(weight_share or WEIGHT_SHARE)
    low, high = min(shares), max(shares)
    shapes = shapes_of(name, targets)
    narrowest = min(shapes.adapted, key=lambda matrix: matrix.width)
    if setting.rank > narrowest.width:
        raise ConfigError(
            f"plan: rank must be at most the width of the narrowest adapted layer, got {setting.rank} for "
            f"{narrowest.width} [{narrowest.name}]. Lower it, or leave that layer out of targets"
        )
    experts = [m.name for m in shapes.adapted if ".experts." in m.name] if setting.bits else []
    if experts:
        raise ConfigError(
            f"plan: bits must be none for experts, which keeplora adapts in 16 or 32 bits, got {setting.bits} "
            f"[{experts[0]}]. Leave them out of targets"
        )
    kept = _Kept(shapes, setting, checkpointing)
    own, peft = kept.of("keeplora", setting.batch), kept.of("peft", setting.batch)
    moments: dict[int, dict[int, tuple[list[Moment], list[Moment]]]] = {}
    lora: dict[int, int] = {}
    fits: dict[int, dict[int, str | None]] = {}
    largest: dict[int, dict[int, tuple[int, int]]] = {}
    for gpus in sorted({1, setting.gpus}):
        at = replace(setting, gpus=gpus)
        moments[gpus] = _moments(shapes, _budgeted(shapes, at, max(cards)), (low, high), own)
        lora[gpus] = _peft(shapes, at, peft)
        fits[gpus], largest[gpus] = {}, {}
        for card in cards:
            room, here = USABLE * card * GB, _budgeted(shapes, at, card)
            every = [moment for _, highs in _moments(shapes, here, (high, high), own).values() for moment in highs]
            fits[gpus][card] = next((moment.name for moment in every if moment.total > room), None)
            later = replace(here, tasks=1, weight_share=high)
            largest[gpus][card] = (
                max((n for n in BATCHES if _training(shapes, later, kept.of("keeplora", n)) <= room), default=0),
                max((n for n in BATCHES if _peft(shapes, at, kept.of("peft", n)) <= room), default=0),
            )
    wire = wire_bytes(shapes, _budgeted(shapes, replace(setting, gpus=1), max(cards)))
    return Plan(
        shapes, setting, moments, lora, fits, largest,
        seconds(shapes, setting, GPUS[gpu], batches), wire, (low, high), gpu, checkpointing,
    )  # fmt: skip


def _moments(
    shapes: Shapes, setting: Setting, shares: tuple[float, float], activations: int
) -> dict[int, tuple[list[Moment], list[Moment]]]:
    """The least and the most of every moment, by the number of tasks before."""
    found = {}
    for tasks in _TASKS:
        settings = [replace(setting, tasks=tasks, weight_share=x, whole_spectra=x == max(shares)) for x in shares]
        low, high = (memory(shapes, each, activations) for each in settings)
        found[tasks] = (low, high)
    return found


def _budgeted(shapes: Shapes, setting: Setting, card: int) -> Setting:
    """With the budget that the method would take by itself on this card, where none is given."""
    if setting.budget is not None:
        return setting
    free = card * GB - parts(shapes, setting)["model"] // setting.gpus
    return replace(setting, budget=max(0, round(FREE_SHARE * free)))


def _training(shapes: Shapes, setting: Setting, activations: int) -> int:
    moments = {moment.name: moment.total for moment in memory(shapes, setting, activations)}
    return moments["training"]


def _peft(shapes: Shapes, setting: Setting, activations: int) -> int:
    """The model, A and B in float32 with gradients and AdamW's moments, and what its layers keep."""
    of = parts(shapes, setting)
    gathered = 0 if setting.gpus == 1 else 2 * of["model"] // max(1, shapes.blocks)
    return of["model"] // setting.gpus + gathered + of["dequantised"] + 4 * of["adapters"] + activations


class _Kept:
    """What a training step keeps for backward, by kind of layers and batch."""

    def __init__(self, shapes: Shapes, setting: Setting, checkpointing: bool):
        self.shapes, self.setting, self.checkpointing = shapes, setting, checkpointing
        self.known: dict[tuple[str, int], int] = {}

    def of(self, kind: Literal["keeplora", "peft"], batch: int) -> int:
        if (kind, batch) not in self.known:
            self.known[kind, batch] = self._count(kind, batch)
        return self.known[kind, batch]

    def _count(self, kind: Literal["keeplora", "peft"], batch: int) -> int:
        s, config = self.setting, self.shapes.config
        text, tokens = getattr(config, "text_config", config), batch * s.length
        merges = kind == "keeplora" and s.bits is None
        own: Kind = "factored" if kind == "keeplora" and s.bits else kind
        block = kept_by_block(config, _DTYPES[s.weight_bytes], s.rank, own, tokens)
        merged = [m.numel for m in self.shapes.adapted if tokens * (m.rows + m.width) >= m.numel] if merges else []
        at_hand = s.weight_bytes * max(merged, default=0)  # the one that is being multiplied with
        logits = WORDS * text.vocab_size * tokens
        if not self.checkpointing:
            return int(self.shapes.blocks * block + at_hand + logits)
        inputs = self.shapes.blocks * s.weight_bytes * text.hidden_size * tokens
        ahead = s.weight_bytes * sum(n for n in merged if n < FORMED_AGAIN)  # when the forward begins
        return int(inputs + block + ahead + at_hand + logits)
