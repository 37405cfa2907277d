"""Which samples train, which choose and which test, where the data does not say: a share of every class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

__all__ = ["split_off", "thinned"]

Item = TypeVar("Item")


def thinned(items: Sequence[Item], most: int) -> Sequence[Item]:
    """At most `most` of the items, evenly spaced; all where `most` is 0.

    Examples:
        >>> thinned(range(10), 4)
        [0, 2, 5, 7]
    """
    if not most or len(items) <= most:
        return items
    return [items[place * len(items) // most] for place in range(most)]


def split_off(classes: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of the samples that stay, and of those split off; both ascending.

    Of a class with n samples `floor(share · n + 1/2)` are split off, at least 1 where `share > 0` and n > 1, and never
    all. Which ones follows from `seed` and the class alone: it keeps its split when other classes come or go.

    Args:
        classes: Class of each sample; samples in an order that does not change (sorted by name).

    Examples:
        >>> split_off(["cat"] * 5 + ["dog"] * 2, 0.2, seed=0)
        ([0, 1, 3, 4, 5], [2, 6])
    """
    held = np.asarray(classes, dtype=object)
    off: list[int] = []
    for name in sorted(set(classes)):
        places = np.flatnonzero(held == name)
        wanted = min(max(math.floor(share * len(places) + 0.5), 1 if share > 0 else 0), len(places) - 1)
        order = np.random.default_rng([seed, *name.encode()]).permutation(len(places))
        off += places[order[:wanted]].tolist()
    taken = set(off)
    return [place for place in range(len(held)) if place not in taken], sorted(off)
