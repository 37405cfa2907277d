"""What is told of weights whose rows lie in several processes: the sums that hashes are made of, and all rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from keeplora.distributed import processes
from keeplora.lora.shares import LocalRows
from keeplora.lora.update import to_host
from keeplora.math.digest import sums_of_rows

__all__ = ["all_rows", "hashes_everywhere", "sums_everywhere"]


def sums_everywhere(weights: Sequence[tuple[LocalRows, Sequence[int]]]) -> list[bytes]:
    """``keeplora.math.digest.sums`` of whole weights, from the rows that are here and all shapes; one all-reduce."""
    if not weights:
        return []
    mine = [sums_of_rows(rows, first, shape) for (rows, first), shape in weights]
    everything, peers = torch.cat(mine), processes()
    peers.gather(None)  # who has failed says so here: an addition would wait for it
    peers.add(everything)
    return [part.cpu().numpy().tobytes() for part in torch.split(everything, [len(part) for part in mine])]


def hashes_everywhere(weights: Sequence[tuple[LocalRows, Sequence[int]]]) -> list[str]:
    """``keeplora.lora.exact.hash_of`` whole weights."""
    return [hashlib.sha256(blocks).hexdigest()[:32] for blocks in sums_everywhere(weights)]


def all_rows(weights: Iterable[tuple[LocalRows, int]]) -> list[Tensor]:
    """Whole weights in the first process, in main memory, from the rows that are here and the number of all of them.

    The others get their own rows back. One weight at a time is on the device, where ``weights`` is a generator.
    """
    peers = processes()
    peers.gather(None)  # who has failed says so here: rows would be waited for
    with peers.in_step():
        return [
            to_host(rows if (found := peers.rows_to(0, rows, count)) is None else found) for (rows, _), count in weights
        ]


def converted(local: LocalRows, dtype: torch.dtype) -> LocalRows:
    """The same rows in another dtype."""
    rows: Tensor = local.rows.detach().to(dtype)
    return LocalRows(rows, local.first)
