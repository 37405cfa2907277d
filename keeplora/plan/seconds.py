"""Seconds of every phase, from operations and bytes over the rates of a GPU: predicted, not measured."""

from __future__ import annotations

from dataclasses import dataclass

from .memory import Setting, footprint, stored
from .shapes import Shapes

__all__ = ["GPUS", "Rates", "seconds"]


@dataclass(frozen=True)
class Rates:
    """What a GPU's data sheet promises, per second: dense 16-bit and float32 operations, bytes of memory and link."""

    half: float
    single: float
    memory: float
    link: float


GPUS = {
    "H200": Rates(989e12, 67e12, 4.8e12, 64e9),
    "H100": Rates(989e12, 67e12, 3.35e12, 64e9),
    "A100": Rates(312e12, 19.5e12, 2.04e12, 32e9),
    "4090": Rates(165e12, 82.6e12, 1.01e12, 32e9),
}
"""NVIDIA's data sheets: H200 and H100 SXM, A100 80 GB SXM, GeForce RTX 4090."""

EFFICIENCY = 0.4
"""Of the promised operations that large products reach."""
EIGEN = 0.1
"""Of the promised float32 operations that a symmetric eigendecomposition reaches; it takes about 9 d³."""
DISK = 2e9


def seconds(shapes: Shapes, setting: Setting, rates: Rates, batches: int) -> dict[str, float]:
    """By phase, on one GPU, for a pass of so many batches."""
    tokens = setting.batch * setting.length
    dense = (rates.half if setting.weight_bytes == 2 else rates.single) * EFFICIENCY
    exact = rates.single * EFFICIENCY
    adapted = sum(m.numel for m in shapes.adapted)
    reading = sum(stored(m, setting) + 2 * m.numel for m in shapes.adapted) / rates.memory if setting.bits else 0.0
    beside = setting.bits is not None or not setting.merge
    older = setting.rank * setting.tasks if beside else 0
    forward = (2 * shapes.active + 2 * older * sum(m.rows + m.width for m in shapes.adapted)) * tokens / dense + reading
    merge = 0.0 if beside else 3 * setting.weight_bytes * adapted / rates.memory + 2 * setting.rank * adapted / dense
    found = {}
    if setting.method != "lora":
        first = 0.0
        if not setting.tasks:
            sides = [(m, min(m.rows, m.width)) for m in shapes.adapted]
            first = sum(2 * m.numel * d / exact + 9 * d**3 / (rates.single * EIGEN) for m, d in sides)
        found["before_task: pass"] = batches * (2 * forward + 2 * tokens * adapted / dense)
        found["before_task: factorise"] = first + sum(8 * m.numel * 8 * setting.rank / exact for m in shapes.adapted)
    thin = 6 * setting.rank * tokens * sum(m.rows + m.width for m in shapes.adapted) / dense
    found["training, a step"] = 2 * forward + merge + thin
    if setting.method != "lora":
        widths = shapes.inputs()
        moments = 2 * tokens * sum(d * d for d in widths) / exact
        found["after_task: pass"] = batches * (forward + moments)
        found["after_task: factorise"] = sum(9 * d**3 for d in widths) / (rates.single * EIGEN)
    found["after_task: merge"] = (8 if beside else 12 + 2 * setting.weight_bytes) * adapted / rates.memory
    kept, before = footprint(shapes, setting), setting.tasks
    new = kept.bases(before + 1) - (kept.bases(before) if before else 0)
    saved = kept.open_task() + new  # since the last save
    found["save"] = saved / rates.link + saved / DISK
    return found
