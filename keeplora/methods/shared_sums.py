"""The sums that hashes are made of, of weights whose rows lie in several processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from keeplora.distributed import processes
from keeplora.lora.shares import LocalRows
from keeplora.math.digest import sums_of_rows

__all__ = ["hashes_everywhere", "sums_everywhere"]


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


def converted(local: LocalRows, dtype: torch.dtype) -> LocalRows:
    """The same rows in another dtype."""
    rows: Tensor = local.rows.detach().to(dtype)
    return LocalRows(rows, local.first)
