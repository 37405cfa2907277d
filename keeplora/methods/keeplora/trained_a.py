"""Trained A: the basis each must stay orthogonal to, and the way back for one that did not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from keeplora.lora import LoraSlot
from keeplora.ops.project_rows import project_rows

__all__ = ["LEAK", "bases_of_a", "leak_of_rows", "restore_confinement"]

LEAK = 1e-6
"""The most of a row of A, relative to the row, that may lie inside the basis."""


def bases_of_a(slots: Sequence[LoraSlot], bases: Sequence[Tensor]) -> dict[nn.Parameter, Tensor]:
    """The protected basis of every adapter's A, like A in dtype and device."""
    adapters = [slot.adapter for slot in slots]
    return {adapter.A: q.to(adapter.A) for adapter, q in zip(adapters, bases, strict=True) if adapter is not None}


@torch.no_grad()
def restore_confinement(function: str, slots: Sequence[LoraSlot], bases: Sequence[Tensor]) -> None:
    """Take what is protected out of every A that training has let in; a warning names the worst.

    An optimizer that knows nothing of the bases leaves A's free space even when A's gradient lies in it.
    """
    adapted = [slot for slot in slots if slot.adapter is not None]
    confined = bases_of_a(slots, bases)
    if not confined:
        return
    leaks = torch.stack([leak_of_rows(a.detach().double(), q.double()).cpu() for a, q in confined.items()]).tolist()
    astray = {a: q for (a, q), leak in zip(confined.items(), leaks, strict=True) if leak > LEAK}
    if not astray:
        return
    rows, _ = project_rows([a.detach() for a in astray], list(astray.values()))
    for a, projected in zip(astray, rows, strict=True):
        a.copy_(projected)
    worst = max(range(len(leaks)), key=leaks.__getitem__)
    warnings.warn(
        f"{function}: {len(astray)} of {len(confined)} trained A had left their free space, by {leaks[worst]:.1e} of "
        f"a row's length in the worst layer [{adapted[worst].name}]. They were projected back, which changes what was "
        "learned. Train with keeper.optimizer(...), or call keeper.confine(optimizer) before training.",
        UserWarning,
        stacklevel=3,
    )


def leak_of_rows(a: Tensor, q: Tensor) -> Tensor:
    """The largest leak of a row: B may weigh the rows as it likes."""
    length = torch.linalg.vector_norm(a, dim=1)
    inside = torch.linalg.vector_norm(a @ q, dim=1)
    return torch.where(length > 0, inside / length, 0).amax()
