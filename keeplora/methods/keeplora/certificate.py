"""The retention certificate: what a task's update may have done to what is protected, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from keeplora._messages import listed
from keeplora.distributed import processes
from keeplora.lora import LoraSlot, merge_adapters
from keeplora.math.batch import portions, within
from keeplora.math.lowrank import Extension
from keeplora.math.subspace import Certificate, certificates
from keeplora.methods.bases import Bases
from keeplora.methods.progress import for_all_layers

__all__ = ["LayerCertificate", "RetentionCertificate", "certified"]

ROWS = 256
"""Of a weight that are in float64 twice."""

MOST_ROUNDED = 0.01
"""Of a stored change that may lie in protected directions before float32 is recommended."""


@dataclass(frozen=True)
class LayerCertificate:
    r"""One layer after one task.

    Attributes:
        name: The target.
        leak_after_rounding: $\|\Delta W Q\|_F / \|\Delta W\|_F$ of the change ΔW that the stored weight really
            made, rounding to its dtype included, against the basis Q that was protected during the task: what is
            deployed. 0 if nothing moved. Where nothing was merged the factors are deployed, and it is ``leak``.
        leak: The same of the update ``c B A`` of the factors, before it was merged.
        orthogonality: ``max |QᵀQ − I|`` of the extended basis.
        captured: Share of the task's feature energy inside the extended basis.
        protected: Directions in the extended basis.
        added: Directions this task added.
        free: Directions that are left.
        dtype: Of the stored weight that was merged into; empty where nothing was merged.
    """

    name: str
    leak_after_rounding: float
    leak: float
    orthogonality: float
    captured: float
    protected: int
    added: int
    free: int
    dtype: str = ""


@dataclass(frozen=True)
class RetentionCertificate:
    """The worst layer in each respect, and every layer. Printed after each task, what is deployed first.

    Attributes:
        task: Index of the task, from 0.
        layers: One entry per adapted weight.
        buffers: Names of the model's buffers that the task has changed: none, unless they may move
            (``frozen_buffers=False``; with PEFT ``also_train``) or are caches outside of the ``state_dict``. No number
            above speaks of what they do.
    """

    task: int
    layers: tuple[LayerCertificate, ...]
    buffers: tuple[str, ...] = ()

    @property
    def leak_after_rounding(self) -> float:
        """The largest of the layers."""
        return max(layer.leak_after_rounding for layer in self.layers)

    @property
    def leak(self) -> float:
        """The largest of the layers."""
        return max(layer.leak for layer in self.layers)

    @property
    def orthogonality(self) -> float:
        """The largest of the layers."""
        return max(layer.orthogonality for layer in self.layers)

    @property
    def captured(self) -> float:
        """The smallest of the layers."""
        return min(layer.captured for layer in self.layers)

    @property
    def advice(self) -> str:
        """What to do where rounding has moved more than a hundredth of the change into protected directions."""
        worst = max(self.layers, key=lambda layer: layer.leak_after_rounding)
        if worst.leak_after_rounding <= MOST_ROUNDED or worst.leak_after_rounding <= 10 * worst.leak:
            return ""
        return (
            f"Rounding to {worst.dtype} puts {100 * worst.leak_after_rounding:.2g} % of the stored weight's change "
            f"into protected directions [{worst.name}]. Keep the model in float32, or deploy the update as float32 "
            "factors that are not merged (export_peft; merge=False with PEFT)."
        )

    def worst(self) -> dict[str, float]:
        """The worst layer in each respect."""
        return {
            "leak_after_rounding": self.leak_after_rounding, "leak": self.leak, "orthogonality": self.orthogonality,
            "captured": self.captured,
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        layers = [asdict(layer) for layer in self.layers]
        return {"task": self.task, **self.worst(), "layers": layers, "buffers": list(self.buffers)}

    def __str__(self) -> str:
        added = sum(layer.added for layer in self.layers)
        room = sum(layer.free for layer in self.layers) / sum(layer.free + layer.protected for layer in self.layers)
        dtypes = sorted({layer.dtype for layer in self.layers} - {""})
        stored = f"in the stored {' and '.join(dtypes)} weights, {self.leak:.1e} " if dtypes else ""
        return (
            f"task {self.task + 1}: leak {self.leak_after_rounding:.1e} {stored}in the factors; "
            f"orthogonality {self.orthogonality:.1e}, captured ≥ {self.captured:.4f}, "
            f"{added} directions added in {len(self.layers)} layers, {100 * room:.0f} % of the space is free"
            + (f", {len(self.buffers)} buffers moved ({listed(self.buffers)})" if self.buffers else "")
            + (f". {self.advice}" if self.advice else "")
        )


def certified(
    slots: Sequence[LoraSlot], bases: Bases, new: Sequence[Extension], *, merge: bool, budget: int, shown: bool | None
) -> list[LayerCertificate]:
    """Merge the slots' adapters and measure what that did, or measure it only: then nothing is rounded.

    Args:
        bases: What was protected while the adapters were trained.
        new: The columns that are from now on, too.
        budget: Bytes of the device that may be used.
    """
    extended = bases.joined([extension.q for extension in new])
    local_sums: dict[int, Tensor] = {}

    def compute(group: list[int]) -> list[LayerCertificate]:
        beside = [i for i in group if slots[i].keeps]
        if 0 < len(beside) < len(group):
            rest = [i for i in group if not slots[i].keeps]
            found = dict(zip([*beside, *rest], [*compute(beside), *compute(rest)], strict=True))
            return [found[i] for i in group]
        members = [slots[i] for i in group]
        factors = [_factors(slot) for slot in members]
        changes = None
        if beside and merge:
            merge_adapters(members)
        elif merge:
            changes = _merged(members)
        if changes is not None and any(slot.exact.first is not None for slot in members):
            local_sums.update({i: _squares(change, bases[i]) for i, change in zip(group, changes, strict=True)})
            changes = None
        a, b = [a for a, _ in factors], [b for _, b in factors]
        proofs = certificates(a, b, [bases[i] for i in group], basis=[extended[i] for i in group], delta=changes)
        return [_layer(slots[i], proof, new[i], merge and not beside) for i, proof in zip(group, proofs, strict=True)]

    with within(budget):
        together = portions([slot.weight for slot in slots])
        layers = for_all_layers(slots, compute, "merge" if merge else "certificate", shown=shown, together=together)
    return _with_sums_of_rows(layers, local_sums) if local_sums else layers


def _squares(change: Tensor, q: Tensor) -> Tensor:
    """``‖ΔW Q‖²`` and ``‖ΔW‖²`` of some rows of ΔW, in float64: they add up over rows."""
    wide = change.double()
    return torch.stack([(wide @ q.double()).square().sum(), wide.square().sum()])


def _with_sums_of_rows(layers: Sequence[LayerCertificate], sums: dict[int, Tensor]) -> list[LayerCertificate]:
    """The leak of every stored change, from the sums over all processes' rows: one all-reduce."""
    stacked = torch.stack([sums[i].to(sums[0].device) for i in range(len(layers))])
    processes().add(stacked)
    leaks = [(inside / whole) ** 0.5 if whole else 0.0 for inside, whole in stacked.tolist()]
    return [replace(layer, leak_after_rounding=leak) for layer, leak in zip(layers, leaks, strict=True)]


def _merged(slots: Sequence[LoraSlot]) -> list[Tensor]:
    """Merge, and return the changes that the stored weights made."""
    before = [slot.local.rows.detach().clone() for slot in slots]
    merge_adapters(slots)
    return [_change(slot.local.rows.detach(), then) for slot, then in zip(slots, before, strict=True)]


def _change(now: Tensor, then: Tensor) -> Tensor:
    """``now − then`` in float64, from some rows at a time: both in float64 would be twice the memory."""
    change = now.to(torch.float64, copy=True)  # of a float64 weight, too: it is written to
    for mine, old in zip(torch.split(change, ROWS), torch.split(then, ROWS), strict=True):
        mine.sub_(old)
    return change


def _factors(slot: LoraSlot) -> tuple[Tensor, Tensor]:
    """A and ``B − B₀`` of the slot's adapter, without rows where there is none: nothing was free, nothing moved."""
    if slot.adapter is not None:
        return slot.adapter.A.detach(), slot.adapter.update().detach()
    out, width = slot.weight.shape
    dtype = torch.float64 if slot.weight.dtype == torch.float64 else torch.float32
    return slot.zeros(0, width, dtype=dtype), slot.zeros(out, 0, dtype=dtype)


def _layer(slot: LoraSlot, proof: Certificate, new: Extension, merged: bool) -> LayerCertificate:
    return LayerCertificate(
        name=slot.name,
        leak_after_rounding=proof.leak if proof.leak_after_rounding is None else proof.leak_after_rounding,
        leak=proof.leak,
        orthogonality=proof.orthogonality,
        captured=new.fraction,
        protected=proof.rank,
        added=new.added,
        free=proof.free,
        dtype=str(slot.weight.dtype).removeprefix("torch.") if merged else "",
    )
