"""Which layers are worked on together: those of one shape, as many as a batched call is faster for."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["batched", "padded", "portions", "same_kind", "stacked", "within"]

# A batched call saves launches. It needs its own copy of the matrices, so large ones, which fill a GPU alone,
# go one by one; on a CPU torch.linalg loops over the batch anyway. cuSOLVER's batched eigenvectors take up to 2^31
# numbers.
BATCH_BYTES = 1 << 30
LARGEST_BATCHED = 1 << 22  # numbers per matrix
COPIES = 4
"""Float64 copies of what is worked on together that the widest of these computations holds at a time."""

_most: ContextVar[int] = ContextVar("most", default=BATCH_BYTES)


@contextmanager
def within(budget: int) -> Iterator[None]:
    """Work on no more layers together than ``budget`` bytes have room for; a single one always is.

    Examples:
        >>> with within(4 * 8 * 4):
        ...     [*portions([torch.zeros(2, 2)] * 3)]
        [[0], [1], [2]]
    """
    token = _most.set(budget // COPIES)
    try:
        yield
    finally:
        _most.reset(token)


def _at_most() -> int:
    return min(BATCH_BYTES, _most.get())


def same_kind(keys: Sequence[Hashable], tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield groups of positions whose ``keys`` are equal, in order of first appearance."""
    positions: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        positions[key].append(i)
    for group in positions.values():
        first = tensors[group[0]]
        size = max(1, _at_most() // max(1, 8 * first.numel())) if batched(first) else 1
        for start in range(0, len(group), size):
            yield group[start : start + size]


def batched(tensor: Tensor) -> bool:
    """Whether one call for many matrices like this one is faster than a call for each."""
    return tensor.device.type != "cpu" and tensor.numel() <= LARGEST_BATCHED


def stacked(tensors: Sequence[Tensor], group: Sequence[int]) -> Tensor:
    """The group's tensors as ``[n, …]``; one alone is viewed, not copied."""
    return tensors[group[0]][None] if len(group) == 1 else torch.stack([tensors[i] for i in group])


def padded(tensors: Sequence[Tensor], group: Sequence[int]) -> Tensor:
    """The group's ``[d, k_i]`` as ``[n, d, max k]``, filled up with zero columns: those project nothing."""
    if len(group) == 1:
        return tensors[group[0]][None]
    width = max(tensors[i].shape[1] for i in group)
    return torch.stack([torch.nn.functional.pad(tensors[i], (0, width - tensors[i].shape[1])) for i in group])


def portions(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield positions in their order, as many at a time as lie on one device and have a float64 copy within bounds.

    Examples:
        >>> [*portions([torch.zeros(2, 2)] * 3)]
        [[0, 1, 2]]
    """
    group: list[int] = []
    size = 0
    for i, tensor in enumerate(tensors):
        more = 8 * tensor.numel()
        if group and (size + more > _at_most() or tensor.device != tensors[group[0]].device):
            yield group
            group, size = [], 0
        group.append(i)
        size += more
    if group:
        yield group
