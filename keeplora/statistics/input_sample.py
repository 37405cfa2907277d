"""A few rows of the layers' inputs, kept while a pass runs for something else: energy along directions yet to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from keeplora.lora import LoraHost, LoraSlot, TokenMask
from keeplora.ops.precision import full_precision

from .passes import ALONE, Peers, counting, zeroed

__all__ = ["ROWS", "InputSample"]

ROWS, OF_A_CALL = 256, 64
"""Rows kept of every input, and at most of one call: the first batches count, not the first alone."""


def evenly_spaced(x: Tensor, mask: Tensor | None, most: int) -> Tensor:
    """At most ``most`` of the tokens of ``x`` that count, as rows; on a GPU rows of zeros where there are fewer."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is None or x.device.type == "cpu" or not len(rows):
        rows = rows if mask is None else rows[mask.reshape(-1)]
        return rows[:: max(1, -(-len(rows) // most))].clone()
    return evenly_spaced_on_device(rows, mask.reshape(-1), most)


def evenly_spaced_on_device(rows: Tensor, keep: Tensor, most: int) -> Tensor:
    """The same where only the device knows how many count: ``most`` rows, zeros behind those that there are."""
    upto = keep.cumsum(0)
    count = upto[-1:]
    step = ((count + most - 1) // most).clamp_min(1)
    wanted = torch.arange(most, device=rows.device) * step
    place = torch.searchsorted(upto, wanted + 1).clamp_max(len(rows) - 1)
    return zeroed(rows[place], wanted < count)


class InputSample:
    """An observer of hosts (``keeplora.statistics.passes.observing``) that keeps ``rows`` rows of every input.

    Rows are evenly spaced among the tokens that count; layers that are given one tensor keep them once. The mask is
    asked of every input, also when no more rows are kept: what it cannot tell is told in the first pass of a task.
    """

    def __init__(self, slots: Sequence[LoraSlot], token_mask: TokenMask | None, rows: int = ROWS):
        self.slots, self.token_mask, self.rows = slots, token_mask, rows
        self.by_place = {(slot.host, slot.slot): slot for slot in slots}
        self.hosts = list(dict.fromkeys(slot.host for slot in slots))
        self.kept: dict[LoraSlot, list[Tensor]] = {slot: [] for slot in slots}
        self.last: tuple[Tensor, Tensor | None, list[Tensor]] | None = None  # an input, which of it counts, its rows

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, host: LoraHost, inputs: Mapping[str, Tensor]) -> None:
        for name, x in inputs.items():
            slot = self.by_place.get((host, name))
            if slot is None:
                continue
            if self.last is None or self.last[0] is not x:
                self.last = x, counting("mean_gradients", self.token_mask, slot, x), []
            _, mask, sampled = self.last
            if sum(map(len, self.kept[slot])) < self.rows:
                if not sampled:
                    sampled.append(evenly_spaced(x, mask, OF_A_CALL))
                self.kept[slot] += sampled

    @torch.no_grad()
    def energies(self, a: Sequence[Tensor], peers: Peers = ALONE) -> list[Tensor]:
        r"""The energy of every slot's inputs along the rows of its A, relative to that along a direction on average.

        $$ e_i = \frac{a_i C a_i^\top}{\lVert a_i \rVert^2 \, \mathrm{tr}\,C / d} $$

        Args:
            a: A ``[r, in]`` for each slot.
            peers: The processes that have sampled, too.

        Returns:
            ``[r]`` in float64 for each slot; ones where no row was kept.
        """
        sums = []
        for slot, rows in zip(self.slots, a, strict=True):
            total = torch.zeros(len(rows) + 1, dtype=torch.float64, device=rows.device)
            for x in self.kept[slot]:
                wide = x.to(rows.device, rows.dtype)
                with full_precision(rows.device):
                    along = torch.linalg.vector_norm(wide @ rows.T, dim=0, dtype=torch.float64) ** 2
                total[:-1] += along / torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).clamp_min(1e-300) ** 2
                total[-1] += torch.linalg.vector_norm(wide, dtype=torch.float64) ** 2 / wide.shape[1]
            sums.append(total)
        if sums:
            order = sorted(range(len(sums)), key=lambda i: self.slots[i].name)
            flat = torch.cat([sums[i].to(sums[0].device) for i in order])
            peers.gather(None)  # who has failed says so here: an addition would wait for it
            peers.add(flat)
            for i, total in zip(order, torch.split(flat, [len(sums[i]) for i in order]), strict=True):
                sums[i] = total.to(sums[i].device)
        self.last = None
        return [torch.where(s[-1] > 0, s[:-1] / s[-1].clamp_min(1e-300), torch.ones_like(s[:-1])) for s in sums]
