"""Gradient statistics: where a task's loss wants to move the adapted weights, from one pass of its data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from keeplora._messages import listed, warn
from keeplora.lora.host import LoraHost
from keeplora.lora.shares import is_shared_out
from keeplora.lora.slot import LoraSlot
from keeplora.math.scale import largest
from keeplora.ops.lora_grad_b import lora_grad_b
from keeplora.ops.precision import full_precision
from keeplora.ops.sketch_rows import sketch_rows
from keeplora.ops.thin_matmul import thin_matmul

from .budget import budget_of, mib
from .passes import ALONE, BatchSize, Peers, Samples, evaluating, frozen, naming_batch, tapping
from .steps import in_step, steps

__all__ = ["mean_gradients", "sketch_widths"]

log = logging.getLogger("keeplora")

AT_ONCE = 256  # rows that are added together: a CPU makes a float32 copy of 16-bit numbers first
ROWS_PER_DIRECTION = 8  # of a sketch: 0.98 of the optimal energy on real gradients
_LEAST = 2.0**-116  # of a gradient's largest entry: below, products that it is a sum of are denormal, or vanish


def sketch_widths(
    slots: Sequence[LoraSlot],
    rank: int,
    *,
    kind: Literal["auto", "exact", "sketch"] = "auto",
    memory_budget: int | None = None,
) -> list[int | None]:
    r"""How each slot's gradient is to be kept: None for exactly, a width for a row sketch.

    Exact gradients take ``4 Σ out · in`` bytes, sketches ``4 Σ w · in`` with ``w = 8 rank`` rows. A weight that has no
    more rows than its sketch would is kept exactly.

    Args:
        rank: Directions that are wanted of each gradient.
        kind: "auto" keeps gradients exactly if all of them fit the budget, and sketches them otherwise.
        memory_budget: Bytes for all statistics together; 20 % of what is free on the weights' devices if None.

    Raises:
        ValueError: ``kind`` is none of the three, or ``memory_budget`` is negative.
    """
    if kind not in ("auto", "exact", "sketch"):
        raise ValueError(f"sketch_widths: kind must be 'auto', 'exact' or 'sketch', got {kind!r}")
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"sketch_widths: memory_budget must not be negative, got {memory_budget} bytes")
    if kind == "auto":
        needed = sum(4 * slot.weight.numel() for slot in slots)
        budget = budget_of(memory_budget, slots)
        kind = "exact" if needed <= budget else "sketch"
        if kind == "sketch":
            kept = sum(4 * min(len(slot.weight), ROWS_PER_DIRECTION * rank) * slot.weight.shape[1] for slot in slots)
            log.info(
                "gradients of %d layers are sketched in %s, with a second pass: exact ones take %s, memory_budget %s",
                len(slots), mib(kept), mib(needed), mib(budget),
            )  # fmt: skip
    width = ROWS_PER_DIRECTION * rank
    return [None if kind == "exact" or slot.weight.shape[0] <= width else width for slot in slots]


def mean_gradients(
    model: nn.Module,
    slots: Sequence[LoraSlot],
    loader: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    keep: Sequence[int | Tensor | None] | None = None,
    seed: int = 0,
    batch_size: BatchSize | None = None,
    peers: Peers = ALONE,
    reached: set[str] | None = None,
) -> list[Tensor]:
    r"""Mean gradient of the loss with respect to each slot's weight over one pass of the data, or part of it.

    $$
    G = \frac{\sum_i n_i \nabla_W\, \ell(\text{batch}_i)}{\sum_i n_i} = \frac{\sum_i n_i\, \delta_i^\top x_i}
    {\sum_i n_i} \quad [\text{out}, \text{in}], \qquad Z = \Psi G \quad [w, \text{in}], \qquad
    G V \quad [\text{out}, w]
    $$

    for batches of $n_i$ samples, each with its mean loss: the mean over samples, whatever the batches. Computed
    from the layers' inputs x and the gradients δ of their outputs: no gradient of any other parameter is formed, and
    for Z and G V none of the weight either. Sums are float32 (float64 for float64 weights) on the weight's device;
    products of 16-bit numbers are formed in their dtype, but in float32 for G V. The model runs in ``eval()`` and is
    left as it was: no update, no ``.grad``, same flags. Layers may be called several times, and under gradient
    checkpointing.

    Args:
        keep: For each slot None for G, w for the row sketch Z ([`sketch_widths`][]), or V ``[in, w]`` for G V; a V
            with no columns leaves the slot out. None for G everywhere.
        seed: Of Ψ (``keeplora.ops.sketch_rows``).
        batch_size: ``n_i`` of a batch, where it is not the leading dimension of the first tensor in it
            ([`keeplora.statistics.batch_size_of`][]): the labelled tokens of a batch whose loss is their mean.
        peers: The processes among which the data are shared out ([`keeplora.distributed.processes`][]): all get the
            mean over the samples of all. A process may have no batch.
        reached: Gets the names of the slots that a token of some batch, of any process, has come to; the gradient of
            the others is zero.

    Raises:
        ValueError: the loader is empty; the loss or a gradient is not finite (the batch or the slot is named);
            ``batch_size`` returns no whole number of at least 1.
        RuntimeError: the loss has no gradient to any of the slots' weights, in all batches or in one that calls their
            layers; or the model reads an adapted weight
            without calling its layer (an adapter there would do nothing).

    Warns:
        UserWarning: gradients are so small that float32 does not hold all they are sums of; the layers are named.

    Source: the sketch is the range finder of Halko, Martinsson & Tropp, 2011, arXiv:0909.4061, with random signs.
    """
    statistics = _Gradients(slots, keep or [None] * len(slots), seed)
    samples, batches = Samples("mean_gradients", batch_size), 0
    tapped = tapping(statistics.hosts, statistics.tap)
    with peers.together(), evaluating(model), frozen(model), tapped, torch.enable_grad():
        for index, (batch, counts) in enumerate(steps(model, loader, peers)):
            weight = samples.weigh(index, batch) if counts else 1
            statistics.counts = counts
            with in_step(model, peers):
                with naming_batch("mean_gradients", index, batch):
                    calls = statistics.calls
                    loss = loss_fn(model, batch)
                _check_scalar("mean_gradients", loss, index)
                if index == 0 and not is_shared_out(model):
                    statistics.check_called(model, batch, loss_fn)
                if loss.requires_grad:
                    # Not autograd.grad: reentrant checkpointing knows backward() only. Only the taps' anchor wants one.
                    (loss if weight == 1 else loss * weight).backward()  # type: ignore[no-untyped-call]
                elif statistics.calls > calls:
                    raise RuntimeError(_NO_GRADIENT)
            _check_finite("mean_gradients", loss, index)  # where the others are in step, and can be told
            batches += counts
    batches = sum(peers.gather(batches))
    if batches == 0:
        raise ValueError(
            "mean_gradients: loader must yield at least one batch, got none. "
            "A generator can be used once: pass a loader that can be iterated again."
        )
    statistics.add_up(peers, samples.add_up(peers))
    if reached is not None:
        reached |= statistics.reached
    return statistics.mean(samples.total)


_NO_GRADIENT = (
    "mean_gradients: the loss must depend on the adapted weights, got no gradient to any of them. "
    "Check that loss_fn runs the model it is given and does not detach or no_grad its output."
)


class _Gradients:
    """The sums, and the tap that adds to them during the backward pass."""

    def __init__(self, slots: Sequence[LoraSlot], keep: Sequence[int | Tensor | None], seed: int):
        self.slots, self.seed = slots, seed
        self.hosts = list(dict.fromkeys(slot.host for slot in slots))
        self.names = {(slot.host, slot.slot): slot.name for slot in slots}
        self.called: set[LoraHost] = set()
        self.counts = True  # what the running step gives
        self.calls = 0  # that a gradient is wanted of
        self.reached: set[str] = set()
        self.touched = False
        self.sums: dict[tuple[LoraHost, str], Tensor] = {}
        self.keep: dict[tuple[LoraHost, str], int | Tensor | None] = {}
        for slot, kept in zip(slots, keep, strict=True):
            weight, key = slot.weight, (slot.host, slot.slot)
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            out, width = weight.shape
            if isinstance(kept, Tensor):
                width = kept.shape[1]
            elif kept is not None:
                out = kept
            self.sums[key] = slot.zeros(out, width, dtype=dtype)
            self.keep[key] = kept
        self.anchor = torch.zeros((), device=slots[0].weight.device, requires_grad=True)

    def tap(self, host: LoraHost, x: Tensor, y: Tensor, rows: Mapping[str, tuple[int, int] | None]) -> Tensor:
        self.called.add(host)
        mine = {slot: span for slot, span in rows.items() if (host, slot) in self.sums}
        if x.numel() and self.counts:
            self.reached |= {self.names[host, slot] for slot in mine}
        mine = {slot: span for slot, span in mine.items() if self.sums[host, slot].numel()}
        if not mine:
            return y
        self.calls += 1

        counts = self.counts

        def add(x: Tensor, dy: Tensor) -> None:
            if not counts:
                return
            for slot, span in mine.items():
                self.add((host, slot), x, dy if span is None else dy[..., span[0] : span[1]])

        tapped: Tensor = _Tap.apply(y, self.anchor, x.detach(), add)
        return tapped

    def add(self, key: tuple[LoraHost, str], x: Tensor, delta: Tensor) -> None:
        self.touched = True
        total, kept = self.sums[key], self.keep[key]
        x, delta = (t.reshape(-1, t.shape[-1]) for t in (x, delta))
        with full_precision(total.device):
            if isinstance(kept, int):
                sketch_rows(x, delta, width=kept, seed=self.seed, out=total)
                return
            if kept is not None:  # V as it is: rounded to 16 bits it would not be the one that the images are taken for
                t = thin_matmul(x, kept.T)
                [image] = lora_grad_b(delta, t, columns=[(0, t.shape[1])], rows=[(0, len(total))], scale=1.0)
                total += image
            elif x.dtype == delta.dtype == total.dtype:
                total.addmm_(delta.T, x)
            else:  # what autograd would form, in the dtype the layer computes in
                product = delta.T @ x.to(delta.dtype)
                for rows, more in zip(torch.split(total, AT_ONCE), torch.split(product, AT_ONCE), strict=True):
                    rows += more

    def check_called(self, model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor]) -> None:
        """Refuse weights that the model reads without calling their layer."""
        silent = [slot for slot in self.slots if slot.host not in self.called]
        weights = [slot.whole for slot in silent]
        if not silent:
            return
        for weight in weights:
            weight.requires_grad_(True)
        loss = loss_fn(model, batch)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else [None]
        for weight in weights:
            weight.requires_grad_(False)
        for slot, gradient in zip(silent, gradients, strict=False):
            if gradient is not None:
                raise RuntimeError(
                    f"mean_gradients: adapted layers must be called, got one whose weight is read without a call "
                    f"[{slot.name}]: its adapter would have no effect. Leave it out of target_modules."
                )

    def add_up(self, peers: Peers, weight: float) -> None:
        """Sums over all processes, by the slots' names: layers may come in another order elsewhere.

        Args:
            weight: Of this process's sums.
        """
        sums = {slot.name: self.sums[slot.host, slot.slot] for slot in self.slots}
        mine = {name: (list(total.shape), str(total.dtype)) for name, total in sums.items()}
        everyone = peers.gather((mine, self.touched, self.reached))
        check_alike("mean_gradients", [theirs for theirs, _, _ in everyone])
        self.touched = any(touched for _, touched, _ in everyone)
        self.reached = set().union(*(reached for _, _, reached in everyone))
        with peers.in_step():
            for name in sorted(sums):
                peers.add(sums[name] if weight == 1 else sums[name].mul_(weight))

    def mean(self, weight: float) -> list[Tensor]:
        if not self.touched:
            raise RuntimeError(_NO_GRADIENT)
        gradients = [self.sums[slot.host, slot.slot].div_(weight) for slot in self.slots]
        sizes = largest(gradients)
        for slot, size in zip(self.slots, sizes, strict=True):
            if not math.isfinite(size):
                raise ValueError(
                    f"mean_gradients: gradients must be finite, got NaN or Inf [{slot.name}]. "
                    "Lower the loss scale, or run this pass in float32 or bfloat16."
                )
        self.check_small(sizes)
        return gradients

    def check_small(self, sizes: Sequence[float]) -> None:
        """Name the slots whose gradient float32 holds in part only; those seen in a frame were named before."""
        small = {
            slot.name: size
            for slot, size in zip(self.slots, sizes, strict=True)
            if 0 < size < _LEAST
            and slot.weight.dtype != torch.float64
            and not isinstance(self.keep[slot.host, slot.slot], Tensor)
        }
        if small:
            least = min(small, key=small.__getitem__)
            warn(
                f"mean_gradients: gradients must have entries that float32 holds, got at most {small[least]:.1e} "
                f"[{least}]: those of {len(small)} of {len(self.slots)} layers are known in part only: "
                f"{listed(list(small))}. Multiply the loss by a power of two, or run the model in float64."
            )


class _Tap(torch.autograd.Function):
    """A copy of y, which hands x and the gradient of y to ``add``. ``anchor`` makes it part of every graph.

    A copy, because models change a layer's output in place, and autograd refuses that for a view made in here.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, x: Tensor, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.add(x, dy)
        return dy, None, None, None


def check_alike(function: str, described: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to add up what has other names, shapes or dtypes in some processes; raises in all of them."""
    first = described[0]
    for rank, other in enumerate(described):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"{function}: every process must adapt the same layers, got {other.get(name)} on rank {rank} for "
                    f"{first.get(name)} on rank 0 [{name}]. Give all processes the same model and settings."
                )


def _check_scalar(function: str, loss: Any, index: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"{function}: loss_fn must return a scalar tensor, got {got} [batch {index}]. "
            "Reduce the loss, for example with .mean()."
        )


def _check_finite(function: str, loss: Tensor, index: int) -> None:
    if not torch.isfinite(loss).all():
        raise ValueError(f"{function}: the loss must be finite, got {loss.item()} [batch {index}]")
