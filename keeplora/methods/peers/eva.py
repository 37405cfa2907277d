"""EVA: A starts at the principal components of a layer's inputs, ranks go where they explain most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from keeplora.distributed import processes
from keeplora.families import token_mask
from keeplora.lora import LoraSlot, TokenMask
from keeplora.lora.host import LoraHost
from keeplora.ops.precision import full_precision
from keeplora.statistics.passes import counting, evaluating, naming_batch, observing

from ..lora import LoraConfig
from ..method import LossFn
from ..progress import progress
from ..settings import check_flag, check_range
from .peer import Factors, Peer

__all__ = ["Eva", "EvaConfig", "ranks_by_variance"]


@dataclass(frozen=True)
class EvaConfig(LoraConfig):
    """Settings of [`Eva`][], PEFT's.

    Args:
        r: The mean rank over layers.
        rho: ρ: a layer gets at most ρ r of the ranks; 1 leaves r to each.
        whiten: Whether rows of A are divided by the root of their singular values.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    rho: float = 2.0
    whiten: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "rho", "[1, inf)")
        check_flag(self, "whiten")


class Eva(Peer):
    r"""Explained variance adaptation, anew in every task.

    $$
    X - \bar X = U \Sigma V^\top, \qquad A = V_{[:,\,:r_l]}^\top, \quad B = 0, \qquad
    \sum_l r_l = r L \text{ of the largest } \sigma_i^2 / \lVert X - \bar X \rVert_F^2
    $$

    with X the inputs of a layer in one pass over the task's data, by incremental principal components; L layers share
    the ranks. Both factors are trained. A layer with no rank gets no adapter. Nothing is kept between tasks, nothing of
    earlier tasks is protected.

    Raises:
        ImportError: PEFT is not installed, or too old.
        RuntimeError: there are several processes (in ``before_task``).
        ValueError: r is larger than the smaller side of a weight; an input is not finite; the loader is empty.

    Source: Paischer et al., "EVA", NeurIPS 2025, arXiv:2410.07170. From PEFT: its incremental components, the share of
    variance that ranks follow, ρ. Here otherwise: one pass over all data, where PEFT goes round until components
    settle, which small data never do; padding does not count where the model's family tells it; s stays what it is
    whatever a layer's rank.

    Examples:
        >>> from torch import nn
        >>> model, data = nn.Sequential(nn.Linear(8, 6)), [torch.randn(16, 8)]
        >>> method = Eva(model, EvaConfig(r=2, target_modules="all-linear"))
        >>> method.before_task(data, lambda model, batch: model(batch).sum())
        >>> method.slots[0].adapter.rank
        2
    """

    name: ClassVar[str] = "eva"
    config_type: ClassVar[type] = EvaConfig
    config: EvaConfig

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        if processes().size > 1:
            raise RuntimeError(
                f"Eva: components are taken in one process, got {processes().size}. Train in one process, or use "
                "lora-ga or inflora."
            )
        most = round(self.config.r * self.config.rho)
        with (
            token_mask(self.model, self.token_mask) as mask,
            progress(loader, "components", "batch", shown=self.progress) as batches,
        ):
            watch = _Watch(self.slots, most, mask)
            with torch.no_grad(), evaluating(self.model), observing(watch.hosts, watch.observe):
                count = 0
                for count, batch in enumerate(batches, 1):
                    with naming_batch("before_task", count - 1, batch):
                        loss_fn(self.model, batch)
        if not count:
            raise ValueError(
                "before_task: loader must yield at least one batch, got none. Pass one that can be iterated again."
            )
        found = [watch.of[slot].result() if slot in watch.of else None for slot in self.slots]
        self.warn_of_unreached([components is not None for components in found])
        ranks = ranks_by_variance([() if c is None else c.shares.tolist() for c in found], self.config.r)
        if not any(ranks):
            raise ValueError(
                "before_task: features must vary, got the same token everywhere. Let loss_fn run the model."
            )

        def start(i: int) -> Factors | None:
            components, rank, weight = found[i], ranks[i], self.slots[i].exact_weight
            if components is None or not rank:
                return None
            a = components.rows[:rank]
            if self.config.whiten:
                a = a / components.lengths[:rank, None].sqrt().clamp_min(torch.finfo(a.dtype).eps)
            return {"A": a.to(weight.dtype), "B": weight.new_zeros(len(weight), rank)}

        self.attach_started(start)


_NOISE = 1e-10
"""Of the variance: a float32 decomposition leaves so much of components that do not exist."""


def ranks_by_variance(shares: Sequence[Sequence[float]], r: int) -> list[int]:
    """How many components each layer gets: of all layers' the ``r × layers`` with the largest share of variance.

    Args:
        shares: By layer, those of its components, in falling order; those at rounding level get nothing.

    Examples:
        >>> ranks_by_variance([[0.9, 0.05], [0.5, 0.4]], 1)
        [1, 1]
        >>> ranks_by_variance([[0.3, 0.2], [0.6, 0.4]], 1)
        [0, 2]
    """
    by_share = sorted((-share, layer) for layer, own in enumerate(shares) for share in own if share > _NOISE)
    chosen = [layer for _, layer in by_share[: r * len(shares)]]
    return [chosen.count(layer) for layer in range(len(shares))]


class _Watch:
    """The incremental components of every slot's inputs; slots that read one tensor share them."""

    def __init__(self, slots: Sequence[LoraSlot], most: int, mask: TokenMask | None):
        self.most, self.mask = most, mask
        self.by_place = {(slot.host, slot.slot): slot for slot in slots}
        self.hosts = list(dict.fromkeys(slot.host for slot in slots))
        self.of: dict[LoraSlot, _Inputs] = {}
        self.last: tuple[Tensor, _Inputs] | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def observe(self, host: LoraHost, inputs: Mapping[str, Tensor]) -> None:
        for name, x in inputs.items():
            slot = self.by_place.get((host, name))
            if slot is None or not x.numel():
                continue
            shared = self.last is not None and self.last[0] is x
            mine = self.of.get(slot)
            if self.last is not None and shared and mine in (None, self.last[1]):
                self.of[slot] = self.last[1]
                continue
            mine = mine or _Inputs(self.most, x.shape[-1])
            keep = counting("before_task", self.mask, slot, x)
            rows = x.detach().reshape(-1, x.shape[-1]) if keep is None else x.detach()[keep]
            if not bool(torch.isfinite(rows).all()):
                raise ValueError(f"before_task: features must be finite, got NaN or Inf [{slot.name}]")
            if len(rows):
                mine.add(rows.float())
                self.of[slot], self.last = mine, (x, mine)


class _Inputs:
    """PEFT's incremental principal components of rows that come in pieces of any length."""

    def __init__(self, most: int, width: int):
        self.count = min(most, width)
        self.wanted = min(2 * self.count, width)  # rows of a piece: what PEFT's low-rank decomposition needs
        self.waiting: list[Tensor] = []
        self.pca: Any = None

    def add(self, rows: Tensor) -> None:
        self.waiting.append(rows.clone())
        if sum(map(len, self.waiting)) >= self.wanted:
            self.fit(self.wanted)

    def fit(self, columns: int) -> None:
        from peft.utils.incremental_pca import IncrementalPCA

        rows, self.waiting = torch.cat(self.waiting), []
        if self.pca is None:
            count = min(self.count, len(rows))
            self.pca = IncrementalPCA(count, copy=True, lowrank=True, lowrank_q=max(columns, count), lowrank_seed=42)
        self.pca.lowrank = len(rows) >= columns
        with full_precision(rows.device):
            self.pca.partial_fit(rows, check_input=False)

    def result(self) -> _Components:
        if self.waiting:
            self.fit(self.wanted)
        shares = self.pca.explained_variance_ratio_.nan_to_num(0.0)
        return _Components(self.pca.components_, self.pca.singular_values_, shares.clamp_min(0.0))


@dataclass(frozen=True)
class _Components:
    """Principal components ``rows [n, in]``, their singular values, and their shares of the variance."""

    rows: Tensor
    lengths: Tensor
    shares: Tensor
