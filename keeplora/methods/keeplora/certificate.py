"""The retention certificate: what a task's update may have done to what is protected, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from keeplora.lora import LoraSlot
from keeplora.math.lowrank import Extension
from keeplora.math.subspace import certificate

__all__ = ["LayerCertificate", "RetentionCertificate", "merge_and_certify"]


@dataclass(frozen=True)
class LayerCertificate:
    r"""One layer after one task.

    Attributes:
        name: The target.
        leak: :math:`\|\Delta W Q\|_F / \|\Delta W\|_F` of the update ``ΔW = c B A`` against the basis Q that was
            protected during the task; 0 if nothing moved.
        leak_after_rounding: The same of the change that the stored weight really made, which includes rounding
            to the layer's dtype.
        orthogonality: ``max |QᵀQ − I|`` of the extended basis.
        captured: Share of the task's feature energy inside the extended basis.
        protected: Directions in the extended basis.
        added: Directions this task added.
        free: Directions that are left.
    """

    name: str
    leak: float
    leak_after_rounding: float
    orthogonality: float
    captured: float
    protected: int
    added: int
    free: int


@dataclass(frozen=True)
class RetentionCertificate:
    """The worst layer in each respect, and every layer. Printed after each task.

    Attributes:
        task: Index of the task, from 0.
        layers: One entry per adapted weight.
    """

    task: int
    layers: tuple[LayerCertificate, ...]

    @property
    def leak(self) -> float:
        return max(layer.leak for layer in self.layers)

    @property
    def leak_after_rounding(self) -> float:
        return max(layer.leak_after_rounding for layer in self.layers)

    @property
    def orthogonality(self) -> float:
        return max(layer.orthogonality for layer in self.layers)

    @property
    def captured(self) -> float:
        return min(layer.captured for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task, "leak": self.leak, "leak_after_rounding": self.leak_after_rounding,
            "orthogonality": self.orthogonality, "captured": self.captured,
            "layers": [asdict(layer) for layer in self.layers],
        }  # fmt: skip

    def __str__(self) -> str:
        added = sum(layer.added for layer in self.layers)
        room = sum(layer.free for layer in self.layers) / sum(layer.free + layer.protected for layer in self.layers)
        return (
            f"task {self.task + 1}: leak {self.leak:.1e} (after rounding {self.leak_after_rounding:.1e}), "
            f"orthogonality {self.orthogonality:.1e}, captured ≥ {self.captured:.4f}, "
            f"{added} directions added in {len(self.layers)} layers, {100 * room:.0f} % of the space is free"
        )


def merge_and_certify(slot: LoraSlot, basis: Tensor, new: Extension, *, merge: bool = True) -> LayerCertificate:
    """Merge the slot's adapter and measure what that did, or measure it only: then nothing is rounded.

    ``basis`` is what was protected while the adapter was trained, ``new`` what is protected from now on.
    """
    adapter = slot.adapter
    out, width = slot.weight.shape
    if adapter is None:  # nothing was free: nothing moved
        a, b, change = basis.new_zeros(0, width), basis.new_zeros(out, 0), None
    else:
        a, b = adapter.A.detach(), adapter.update().detach()
        change = _merge(slot) if merge else None
    proof = certificate(a, b, basis, basis=new.q, delta=change)
    return LayerCertificate(
        name=slot.name,
        leak=proof.leak,
        leak_after_rounding=proof.leak if proof.leak_after_rounding is None else proof.leak_after_rounding,
        orthogonality=proof.orthogonality,
        captured=new.fraction,
        protected=proof.rank,
        added=new.added,
        free=proof.free,
    )


def _merge(slot: LoraSlot) -> Tensor:
    """Merge, and return the change that the stored weight made."""
    before = slot.weight.detach().to(torch.float64, copy=True)
    slot.merge()
    return slot.weight.detach().double() - before
