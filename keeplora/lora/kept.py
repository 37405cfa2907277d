r"""Updates that are kept beside a weight, which stays what it was when the method was made.

$$ y = x W_0^\top + \sum_t c_t\,(x A_t^\top) B_t^\top = x W_0^\top + \bigl(x\,[A_1; A_2; \dots]^\top\bigr)
[c_1 B_1, c_2 B_2, \dots]^\top $$

One pair of products of rank Σr. Once ``Σ r > out · in / (out + in)`` the sum ``Σ c_t B_t A_t [out, in]`` is smaller
than the factors, and takes their place: then it is one product. Factors and sum are kept in float32 in main memory, and
on the device once more in the dtype the layer computes in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import compute_dtype
from .exact import Exact, exact_dtype, hash_of
from .update import Update

if TYPE_CHECKING:
    from .slot import LoraSlot

__all__ = ["Kept"]


class Kept(Exact):
    """Of one slot the weight that is never written, and what was learned beside it."""

    def __init__(self, slot: LoraSlot):
        super().__init__()
        self.slot = slot
        self._ready: tuple[tuple[torch.device, torch.dtype], Tensor, Tensor | None] | None = None
        self._stamp: tuple[int, int, int] | None = None

    def share(self, x: Tensor) -> Tensor | None:
        """What the updates add to the layer's output for ``x [..., in]``, in the dtype it computes in; None of none."""
        if not self.learned and self.total is None:
            return None
        dtype = compute_dtype(x)
        first, second = self._on(x.device, dtype)
        y = F.linear(x.to(dtype), first)
        return y if second is None else F.linear(y, second)

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """A's and B's ``[Σr, in]`` and ``[out, Σr]``, or the sum ``[out, in]`` and None."""
        key = (device, dtype)
        if self._ready is None or self._ready[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                if self.total is not None:
                    total = self.total.to(device)
                    for update in self.learned or ():
                        total = self._added(total, update)
                    self._ready = key, total.to(dtype), None
                else:
                    shape = self.slot.weight.shape
                    a, b = Update.stacked(self.learned or [], *shape)
                    self._ready = key, a.to(device, dtype), b.to(device, dtype)
        return self._ready[1:]

    @torch.no_grad()
    def fold(self) -> None:
        """Write ``W₀ + Σ`` into the weight, rounded once, and keep nothing."""
        weight = self.slot.weight
        weight.copy_(self.value(weight))
        self.learned, self.total, self._ready = [], None, None

    @property
    def device_bytes(self) -> int:
        """What of the updates is on the device."""
        tensors = self._ready[1:] if self._ready is not None else ()
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def keep(self, update: Update) -> bool:
        """One more update; returns whether the sum of all is kept from now on."""
        assert self.learned is not None
        self.fresh.append(update)
        self.learned.append(update)
        self._ready = None
        return self._condense(self.slot.weight)

    # ------------------------------------------------------------------ as Exact

    def value(self, weight: Tensor) -> Tensor:
        """``W₀ + Σ``, formed anew."""
        first = self.slot.part(self.slot.readable()).detach()
        return self._sum(first) if self.merged_into else first.to(exact_dtype(first))

    def pretrained(self, weight: Tensor) -> Tensor | None:
        return self.slot.part(self.slot.readable(comparable=True)).detach()

    def pretrained_hash(self, weight: Tensor) -> str:
        stored = self.slot.stored
        if stored.is_meta:
            return ""
        stamp = (id(stored), stored.data_ptr(), 0 if stored.is_inference() else stored._version)
        if self.origin is None or self._stamp != stamp:
            start = self.pretrained(weight)
            assert start is not None
            self.origin, self._stamp = hash_of(start), stamp
        return self.origin

    @property
    def merged_into(self) -> bool:
        return bool(self.learned) or self.total is not None

    @property
    def follows(self) -> bool:
        return True

    @property
    def at_hand(self) -> bool:
        return True

    def settle(self, weight: Tensor) -> None:
        pass

    def begin(self, weight: Tensor) -> None:
        pass

    def follow(self, weight: Tensor) -> None:
        self._ready = None

    def keep_apart(self, weight: Tensor, master: Tensor | None) -> None:
        pass

    def forget(self, weight: Tensor) -> None:
        raise self._error("forget")

    def set(self, weight: Tensor, exact: Tensor) -> None:
        raise self._error("set_exact_weight")

    def merged(self, weight: Tensor, exact: Tensor, update: Update) -> bool:
        raise self._error("merge")

    def restore(
        self, weight: Tensor, exact: Tensor | None, learned: list[Update] | None, total: Tensor | None, *,
        known: bool, pretrained: str,
    ) -> None:  # fmt: skip
        assert exact is None
        assert learned is not None
        self.learned, self.total, self.fresh, self._ready = learned, total, [], None

    def _error(self, function: str) -> RuntimeError:
        return RuntimeError(
            f"{function}: weight must be one that may be written to, got one whose updates are kept beside it "
            f"[{self.slot.name}]"
        )
