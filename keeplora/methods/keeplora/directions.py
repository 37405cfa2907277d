"""Where a task wants to go: the passes over its data, exact or sketched, and the directions they give; or chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.distributed import processes
from keeplora.families import token_mask
from keeplora.lora import LoraSlot, TokenMask
from keeplora.math.lowrank import TopDirections, directions_within, top_directions
from keeplora.math.orthonormal import reorthogonalize
from keeplora.methods.method import LossFn
from keeplora.methods.progress import for_all_layers, progress
from keeplora.ops.precision import full_precision
from keeplora.statistics import BatchSize, first_batches, mean_gradients, sketch_widths
from keeplora.statistics.input_sample import ROWS, InputSample
from keeplora.statistics.passes import observing

from .config import KeepLoraConfig

__all__ = ["RandomDirections", "TaskGradients", "balanced", "direction_finder"]

AT_ONCE = 1024
"""Rows whose length is taken together: a CPU makes a copy of them in float64."""


def direction_finder(
    model: nn.Module,
    slots: Sequence[LoraSlot],
    loader: Iterable[Any],
    loss_fn: LossFn,
    config: KeepLoraConfig,
    task: int,
    shown: bool | None = None,
    batch_size: BatchSize | None = None,
    own_mask: TokenMask | None = None,
) -> TaskGradients | RandomDirections:
    """What ``config.directions`` asks for; the passes over the data, if any, are made here."""
    if config.directions == "random":
        return RandomDirections(slots, config, task)
    return TaskGradients(model, slots, loader, loss_fn, config, shown=shown, batch_size=batch_size, own_mask=own_mask)


class RandomDirections:
    r"""Directions of free space that know nothing of the task: the control of gradient initialisation.

    $$ A = \mathrm{orth}\big((I - Q Q^\top)\,Z\big)^\top, \quad Z_{ij} \sim \mathcal N(0, 1) $$

    so that the span of A is uniformly distributed in the complement of Q; the same for the same seed and task.
    """

    def __init__(self, slots: Sequence[LoraSlot], config: KeepLoraConfig, task: int):
        self.slots, self.r = slots, config.r
        self.seed = int(config.seed) * 1009 + task
        self.reached = [True] * len(slots)  # nobody looked
        self.silent: list[str] = []
        self.free_shares: list[float | None] = [None] * len(slots)

    def directions(self, bases: Sequence[Tensor]) -> list[TopDirections]:
        """r directions outside of every basis, fewer where less is free; ``s`` is 1."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn_directions = []
        for slot, q in zip(self.slots, bases, strict=True):
            r = min(self.r, q.shape[0] - q.shape[1])
            drawn = torch.randn(q.shape[0], r, generator=generator).to(q.device)
            (columns,) = reorthogonalize([drawn], [q]) if r else [drawn]
            nothing = q.new_zeros(slot.weight.shape[0], columns.shape[1])
            drawn_directions.append(TopDirections(columns.T.contiguous(), q.new_ones(columns.shape[1]), nothing))
        return drawn_directions


def balanced(a: Tensor, energy: Tensor) -> Tensor:
    r"""A, no longer than what evens out the energy of the inputs along its rows.

    $$ A \leftarrow A \min(1, \bar e^{-1/2}), \qquad \bar e = \frac1r \sum_i e_i $$

    Under Adam every column of B moves alike, whatever the size of ``x Aᵀ``, so an update is as strong as the inputs are
    along A: on pretrained encoders up to fifty times as strong in a first task as in the mean direction. One factor for
    all rows of a layer: how they compare with each other is what the gradient wants. ``A Q = 0`` stays, and so does the
    certificate.

    Args:
        a: A ``[r, in]``.
        energy: e ``[r]``, of the inputs along each row, relative to the mean direction.

    Source: ours.

    Examples:
        >>> balanced(torch.eye(2), torch.tensor([7.0, 1.0]))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    return a * energy.mean().clamp_min(1).rsqrt().to(a)


class TaskGradients:
    """What one pass over a task's data tells of the gradients of the adapted weights, and ``directions`` of it.

    With ``config.balances`` A is shortened where the task's inputs are strong along it (``balanced``), as a sample
    of inputs tells that is taken in the same pass. Where it is not known which tokens of the inputs will count as
    features, or a mask of the user's does not fit them, this first pass is where the user is told.

    ``reached`` says of every slot whether a token has come to it; ``free_shares``, after ``directions``, which
    share of the gradient's energy lies outside of its basis, None where it has none.

    Exact gradients need no more. A row sketch knows the space a gradient's leading rows lie in far better than which
    directions lead there (on a pretrained encoder 8 r rows alone capture 0.91 of the energy that rank r can, worst
    layer), so a second pass gathers ``G V`` in that space: 0.98.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[LoraSlot],
        loader: Iterable[Any],
        loss_fn: LossFn,
        config: KeepLoraConfig,
        *,
        shown: bool | None,
        ranks: Sequence[int] | None = None,
        batch_size: BatchSize | None = None,
        own_mask: TokenMask | None = None,
    ):
        self.model, self.slots, self.loss_fn = model, slots, loss_fn
        self.config, self.shown, self.batch_size = config, shown, batch_size
        self.batches = first_batches(loader, config.data_fraction)
        self.ranks = [config.r] * len(slots) if ranks is None else list(ranks)
        widths = sketch_widths(
            slots, max(self.ranks), kind=config.gradient_statistic, memory_budget=config.memory_budget
        )
        reached: set[str] = set()
        self.sample: InputSample | None = None
        # Free memory may differ between processes: where one has to sketch, all do.
        self.widths = max(processes().gather(widths), key=lambda chosen: sum(width is not None for width in chosen))
        with ExitStack() as stack:
            if config.balances or config.feature_source == "inputs":
                mask = stack.enter_context(token_mask(model, own_mask))
                sample = InputSample(slots, mask, rows=ROWS if config.balances else 0)
                stack.enter_context(observing(sample.hosts, sample))
                self.sample = sample if config.balances else None
            self.matrices = self._pass(self.widths, "gradients", reached)
        self.free_shares: list[float | None] = []
        self.reached = [slot.name in reached for slot in slots]

    def directions(self, bases: Sequence[Tensor]) -> list[TopDirections]:
        """The leading directions of every gradient outside ``bases``, at most r each, or at most its own rank."""
        self.free_shares = _free_shares(self.matrices, bases)
        frames = self._frames(bases)
        if any(frame is not None and frame.shape[1] for frame in frames):
            nothing = [slot.zeros(slot.weight.shape[1], 0) for slot in self.slots]  # those known exactly
            keep = [none if frame is None else frame for frame, none in zip(frames, nothing, strict=True)]
            images = self._pass(keep, "gradients, again")
            for i, frame in enumerate(frames):
                if frame is not None:
                    self.matrices[i] = images[i]
        ranks, seed = self.ranks, self.config.seed

        def compute(group: list[int]) -> list[TopDirections]:
            tops_of: dict[int, TopDirections] = {}
            exact = [i for i in group if frames[i] is None]
            tops = top_directions(
                [self.matrices[i] for i in exact], [bases[i] for i in exact], [ranks[i] for i in exact], seed=seed
            )
            tops_of.update(zip(exact, tops, strict=True))
            seen = {i: frame for i in group if (frame := frames[i]) is not None}
            images = [
                self.matrices[i] if v.shape[1] else v.new_zeros(self.slots[i].weight.shape[0], 0)
                for i, v in seen.items()
            ]
            tops = directions_within(images, [*seen.values()], [ranks[i] for i in seen])
            tops_of.update(zip(seen, tops, strict=True))
            return [tops_of[i] for i in group]

        found = for_all_layers(self.slots, compute, "adapters", shown=self.shown)
        if self.sample is None:
            return found
        energies = self.sample.energies([top.a for top in found], processes())
        return [replace(top, a=balanced(top.a, e)) for top, e in zip(found, energies, strict=True)]

    @property
    def silent(self) -> list[str]:
        """Layers that a batch has reached, and the loss has no gradient to."""
        known = zip(self.slots, self.reached, self.free_shares, strict=True)
        return [slot.name for slot, reached, share in known if reached and share is None]

    def _frames(self, bases: Sequence[Tensor]) -> list[Tensor | None]:
        """Orthonormal columns that span the rows of each sketch outside the basis; None for exact gradients."""
        frames: list[Tensor | None] = [None] * len(self.slots)
        for i, width in enumerate(self.widths):
            if width is not None:
                (frames[i],) = reorthogonalize([self.matrices[i].T.contiguous()], [bases[i]])
        return frames

    def _pass(self, keep: Sequence[int | Tensor | None], phase: str, reached: set[str] | None = None) -> list[Tensor]:
        with progress(self.batches, phase, "batch", shown=self.shown) as counted, torch.enable_grad():
            return mean_gradients(
                self.model, self.slots, counted, self.loss_fn, keep=keep, seed=self.config.seed, peers=processes(),
                reached=reached, batch_size=self.batch_size,
            )  # fmt: skip


@torch.no_grad()
def _free_shares(gradients: Sequence[Tensor], bases: Sequence[Tensor]) -> list[float | None]:
    r"""``1 − ‖G Q‖² / ‖G‖²`` of every gradient, or of a sketch of its rows; None of one that is zero."""
    if not gradients:
        return []
    with full_precision(gradients[0].device):
        pairs = zip(gradients, bases, strict=True)  # one basis and one product at a time
        lengths = [torch.stack([_length(g), _length(g @ q.to(g))]).to(gradients[0].device) for g, q in pairs]
        known = torch.stack(lengths).tolist()
    return [max(1 - (inside / whole) ** 2, 0.0) if whole else None for whole, inside in known]


def _length(matrix: Tensor) -> Tensor:
    portions = torch.split(matrix, AT_ONCE)
    lengths = [torch.linalg.vector_norm(rows, dtype=torch.float64) for rows in portions]
    length: Tensor = torch.linalg.vector_norm(torch.stack(lengths))
    return length
