"""Which test items a model got right, as short text: what a record keeps for paired tests."""

from __future__ import annotations

import base64
import binascii

import numpy as np
from numpy.typing import ArrayLike, NDArray


def packed(correct: ArrayLike) -> str:
    """Booleans [n] as base64 of n/8 bytes, the first item in the highest bit.

    >>> packed([True, False, True])
    'oA=='
    """
    return base64.b64encode(np.packbits(np.asarray(correct, dtype=bool)).tobytes()).decode("ascii")


def unpacked(text: str, items: int) -> NDArray[np.bool_]:
    """The booleans [items] in what ``packed`` gave; ``ValueError`` where it holds another number of them.

    >>> unpacked("oA==", 3)
    array([ True, False,  True])
    """
    try:
        data = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"unpacked: text must be base64, got {text!r}") from error
    bits = np.unpackbits(data)
    if len(data) != -(-items // 8) or bits[items:].any():
        raise ValueError(f"unpacked: text must hold {items} items, got {text!r}")
    return bits[:items].astype(bool)
