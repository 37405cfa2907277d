r"""What a weight is before it is rounded to its layer's dtype: from the pretrained one and all that was merged.

$$ W = W_0 + \sum_t c_t B_t A_t $$

in float32, added up in the order of the tasks. A weight in float32 is that sum itself. Of one in half precision the
pretrained weight is kept in main memory, in its own dtype, with the factors: half of the bytes of a float32 copy, none
of them on the device. It gives the same sum, bit for bit, as a float32 weight that is added to.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from keeplora.math.digest import sums
from keeplora.ops.merge_weights import merge_weights

from .update import Update, to_host

__all__ = ["WIDE", "Exact", "hash_of"]

WIDE = (torch.float32, torch.float64)
"""Dtypes that are summed in as they are; a weight in another is rounded from its exact value."""


def hash_of(weight: Tensor) -> str:
    """Of all values, the same on every device; of weights without values, nothing."""
    if weight.is_meta:
        return ""
    return hashlib.sha256(sums(weight, remembered=True)).hexdigest()[:32]


def exact_dtype(weight: Tensor) -> torch.dtype:
    """What the weight before rounding, and what is learned of it, are held in: float64 or float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class Exact:
    """The exact value of one slot's weight, which every method here is given as ``weight [out, in]``.

    Attributes:
        learned: Every update that was merged, in main memory; None where some are unknown.
        total: Their sum, since that is smaller than all of them; then ``learned`` is empty.
        start: W₀ of a weight in half precision, in main memory, since the first merge.
        master: The exact value itself, of a weight in half precision: on the device if ``on_device``, else in main
            memory, where updates are unknown.
        known: Whether the weight is W₀ and what was merged, and nothing else has been written to it.
        on_device: Whether a weight in half precision has its exact value beside it on the device.
        fresh: The updates that were merged since this was emptied.
        first: Of a weight whose rows are shared out over processes (``keeplora.lora.shares``) the first that is here.
            Every process keeps whole updates, and adds their rows to its own.
    """

    def __init__(self) -> None:
        self.learned: list[Update] | None = []
        self.total: Tensor | None = None
        self.start: Tensor | None = None
        self.master: Tensor | None = None
        self.known = True
        self.on_device = False
        self.fresh: list[Update] = []
        self.first: int | None = None
        self.origin: str | None = None  # the hash of W₀,
        self._written: str | None = None  # and of what was written last; None before

    def value(self, weight: Tensor) -> Tensor:
        """The weight before rounding. What somebody else has written to the layer counts as it is."""
        if weight.dtype in WIDE or not self._is_ours(weight):
            return weight.to(exact_dtype(weight))
        if self.master is not None:
            return self.master.to(weight.device)
        return weight.float() if self.start is None else self._sum(self.start.to(weight.device))

    def pretrained(self, weight: Tensor) -> Tensor | None:
        """W₀, where it still is at hand."""
        if self.start is not None:
            return self.start
        return weight if self.known and self._written is None else None

    def pretrained_hash(self, weight: Tensor) -> str:
        return hash_of(weight) if self.origin is None else self.origin

    @property
    def merged_into(self) -> bool:
        """Whether anything was written here yet."""
        return self._written is not None

    @property
    def at_hand(self) -> bool:
        """Whether W₀ is here, apart from the weight that was merged into."""
        return self.start is not None

    def share(self, x: Tensor) -> Tensor | None:
        """What updates that are kept beside the weight add to the output for ``x``: none are, they are in it."""
        return None

    @property
    def follows(self) -> bool:
        """Whether the weight follows, bit for bit, from W₀ and what is kept of the updates."""
        return self.known and self.learned is not None and (self.total is None or self.start is not None)

    def forget(self, weight: Tensor) -> None:
        """No longer know what was merged: the exact value itself is kept."""
        exact = self.value(weight)
        self.learned, self.total = None, None
        self.set(weight, exact)

    def keep_apart(self, weight: Tensor, master: Tensor | None) -> None:
        """Updates are known elsewhere; here the exact value counts, which may be known."""
        self.learned, self.known = None, False
        if master is not None and torch.equal(master.to(weight), weight):
            self.master, self._written = master, hash_of(weight)

    def settle(self, weight: Tensor) -> None:
        """Notice what somebody else has written to the layer."""
        if not self._is_ours(weight):
            self.start, self.master, self.known = None, None, False

    def begin(self, weight: Tensor) -> None:
        """Before something is merged into ``weight``."""
        self.settle(weight)
        if self.known and self._written is None:
            if self.origin is None or self.first is None:
                self.origin = hash_of(weight)
            if weight.dtype not in WIDE and not self.on_device:
                self.start = to_host(weight)

    def merged(self, weight: Tensor, exact: Tensor, update: Update) -> bool:
        """``exact``, with this update, is the new value; returns whether the sum of all is kept from now on."""
        self.fresh.append(update)
        turned = False
        if self.learned is not None:
            self.learned.append(update)
            turned = self._condense(weight)
            if self.total is not None and self.start is not None:
                exact = self._sum(self.start.to(weight.device))
        self._write(weight, exact)
        return turned

    def set(self, weight: Tensor, exact: Tensor) -> None:
        """A value of the weight that no update tells."""
        self.start, self.known = None, False
        self._write(weight, exact)

    def restore(
        self, weight: Tensor, exact: Tensor | None, learned: list[Update] | None, total: Tensor | None, *,
        known: bool, pretrained: str,
    ) -> None:  # fmt: skip
        """Be what a state says; ``exact`` is None where it follows from W₀, which is at hand."""
        first = None if exact is not None else self.pretrained(weight)
        assert exact is not None or first is not None
        merged = bool(learned) or total is not None
        self.learned, self.total, self.known, self.fresh = learned, total, known, []
        self.origin, self.start, self.master = pretrained, None, None
        narrow = weight.dtype not in WIDE
        if first is not None:
            if merged and narrow and not self.on_device:
                self.start = to_host(first) if first is weight else first
            first = first.to(weight.device)
            exact = self._sum(first) if merged else first
        elif narrow and merged and not self.on_device:
            self.known = False  # without W₀ the next sum would not be known
        assert exact is not None
        self._write(weight, exact.to(weight.device))
        if self.known and not merged and self.master is None:
            self.origin, self._written = None, None

    def follow(self, weight: Tensor) -> None:
        """The layer was moved: what is on its device moves too."""
        if self.master is not None and self.on_device:
            self.master = self.master.to(weight.device)

    def _is_ours(self, weight: Tensor) -> bool:
        return self._written is None or self._written == hash_of(weight)

    def _write(self, weight: Tensor, exact: Tensor) -> None:
        weight.copy_(exact)
        self.master = None
        if weight.dtype not in WIDE and (self.on_device or not self.known) and not torch.equal(weight.float(), exact):
            wide = exact.detach().float()
            self.master = wide.to(weight.device, copy=True) if self.on_device else to_host(wide)
        self._written = hash_of(weight)

    def _sum(self, first: Tensor) -> Tensor:
        """W₀ and all that was merged."""
        wide = first.to(exact_dtype(first))
        if self.total is not None:
            wide = wide + self.total.to(wide.device)
        for update in self.learned or ():
            wide = self._added(wide, update)
        return wide

    def _condense(self, weight: Tensor) -> bool:
        """Keep the sum of all updates where it is smaller than all of them."""
        assert self.learned is not None
        if self.first is not None:
            return False
        out, width = weight.shape
        had = self.total is not None
        if not had and sum(update.rank for update in self.learned) * (out + width) <= out * width:
            return False
        total = weight.new_zeros(out, width, dtype=exact_dtype(weight))
        if self.total is not None:
            total = self.total.to(weight.device)
        for update in self.learned:
            total = self._added(total, update)
        self.total, self.learned = to_host(total), []
        return not had

    def _added(self, weight: Tensor, update: Update) -> Tensor:
        first = self.first or 0
        a, b = update.a.to(weight.device), update.b[first : first + len(weight)].to(weight.device)
        return merge_weights([weight], [a], [b], scale=update.scaling)[0]
