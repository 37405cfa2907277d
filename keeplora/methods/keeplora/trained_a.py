"""Trained A: the basis each must stay orthogonal to, and the way back for one that did not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from keeplora._messages import warn
from keeplora.ops.project_rows import project_rows

__all__ = ["LEAK", "confined_again", "leak_of_rows"]

LEAK = 1e-6
"""The most of a row of A, relative to the row, that may lie inside the basis."""


@contextmanager
def confined_again(
    function: str, factors: Mapping[str, tuple[nn.Parameter, Callable[[], Tensor]]], remedy: str
) -> Iterator[None]:
    """Take what is protected out of every A that training has let in; a warning names the worst.

    An optimizer that knows nothing of the bases leaves A's free space even when A's gradient lies in it. If the block
    fails, every A is what it was.

    Args:
        factors: A ``[r, in]`` and what gives its protected basis ``[in, k]``, by layer.
        remedy: How to train it next time.
    """
    leaks = {name: leak_of_rows(a.detach(), basis()) for name, (a, basis) in factors.items()}
    astray = [(a, basis().to(a)) for name, (a, basis) in factors.items() if leaks[name] > LEAK]
    if not astray:
        yield
        return
    before = [a.detach().clone() for a, _ in astray]
    with torch.no_grad():
        rows, _ = project_rows(before, [q for _, q in astray])
        try:
            for (a, _), projected in zip(astray, rows, strict=True):
                a.copy_(projected)
            worst = max(leaks, key=leaks.__getitem__)
            warn(
                f"{function}: {len(astray)} of {len(factors)} A were trained and had left their free space, by "
                f"{leaks[worst]:.1e} of a row's length in the worst layer [{worst}]. They were projected back, which "
                f"changes what was learned. {remedy}"
            )
            yield
        except BaseException:
            for (a, _), own in zip(astray, before, strict=True):
                a.copy_(own)
            raise


def leak_of_rows(a: Tensor, q: Tensor) -> float:
    """The largest leak of a row: B may weigh the rows as it likes."""
    wide = a.double()
    length = torch.linalg.vector_norm(wide, dim=1)
    inside = torch.linalg.vector_norm(wide @ q.to(wide), dim=1)
    return float(torch.where(length > 0, inside / length, 0).amax()) if len(a) else 0.0
