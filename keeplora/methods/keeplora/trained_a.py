"""Trained A: the basis each must stay orthogonal to, and the way back for one that did not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from keeplora._messages import warn
from keeplora.ops.project_rows import project_rows

__all__ = ["LEAK", "leak_of_rows", "restore_confinement"]

LEAK = 1e-6
"""The most of a row of A, relative to the row, that may lie inside the basis."""


@torch.no_grad()
def restore_confinement(function: str, factors: Mapping[str, tuple[nn.Parameter, Tensor]], remedy: str) -> None:
    """Take what is protected out of every A that training has let in; a warning names the worst.

    An optimizer that knows nothing of the bases leaves A's free space even when A's gradient lies in it.

    Args:
        factors: A ``[r, in]`` and its protected basis ``[in, k]``, by layer. remedy: How to train it next time.
    """
    if not factors:
        return
    leaks = {name: leak_of_rows(a.detach(), q) for name, (a, q) in factors.items()}
    astray = [(a, q.to(a)) for name, (a, q) in factors.items() if leaks[name] > LEAK]
    if not astray:
        return
    rows, _ = project_rows([a.detach() for a, _ in astray], [q for _, q in astray])
    for (a, _), projected in zip(astray, rows, strict=True):
        a.copy_(projected)
    worst = max(leaks, key=leaks.__getitem__)
    warn(
        f"{function}: {len(astray)} of {len(factors)} A were trained and had left their free space, by "
        f"{leaks[worst]:.1e} of a row's length in the worst layer [{worst}]. They were projected back, which changes "
        f"what was learned. {remedy}"
    )


def leak_of_rows(a: Tensor, q: Tensor) -> float:
    """The largest leak of a row: B may weigh the rows as it likes."""
    wide = a.double()
    length = torch.linalg.vector_norm(wide, dim=1)
    inside = torch.linalg.vector_norm(wide @ q.to(wide), dim=1)
    return float(torch.where(length > 0, inside / length, 0).amax()) if len(a) else 0.0
