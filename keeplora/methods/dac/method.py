"""DAC: a pool of rank-1 experts per weight, routed by class tokens and kept apart across tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora._calls import public
from keeplora._messages import warn
from keeplora.distributed import processes
from keeplora.families.class_tokens import class_tokens_of
from keeplora.methods.lora import LoraConfig, kaiming
from keeplora.methods.lora_method import LoraMethod
from keeplora.methods.method import LossFn
from keeplora.methods.reading import stored
from keeplora.methods.settings import check_range, check_whole
from keeplora.methods.state import State

from .experts import ExpertPool, ago_loss, most_used

__all__ = ["Dac", "DacConfig"]


@dataclass(frozen=True)
class DacConfig(LoraConfig):
    """Settings of [`Dac`][]: those of its public code, as far as the methods are compared on equal terms.

    Args:
        r: Rank-1 experts per adapted weight.
        alpha: The update is scaled by ``alpha / r``; 1 in the public code, here r (None), as for every method.
        active: Experts a sample votes for, and experts a batch is computed with; ``⌈2 r / 3⌉`` (8 of 12) if None.
        merged: Experts that stay after the task; ``⌈r / 3⌉`` (4 of 12) if None.
        ago_weight: Weight of the AGO loss.
        dropout: Of the experts' inputs in training.
        target_modules: The public code takes ``("attn", "mlp")``; here ``("attn",)``, as for every method.
        seed: Of the first experts and routers.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> DacConfig().counts, DacConfig(r=1).counts
        ((8, 4), (1, 1))
    """

    r: int = 12
    active: int | None = None
    merged: int | None = None
    ago_weight: float = 0.1
    dropout: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("active", "merged"):
            check_whole(self, name, f"[1, {self.r}]", optional=True, remedy="There are r experts.")
        check_range(self, "ago_weight", "[0, inf)")

    @property
    def counts(self) -> tuple[int, int]:
        """(active, merged) in numbers."""
        return self.active or math.ceil(2 * self.r / 3), self.merged or math.ceil(self.r / 3)


class Dac(LoraMethod):
    r"""Decomposing and composing: a sparse choice of rank-1 experts for every batch, the most used of them kept.

    $$
    y = x W^\top + \tfrac{\alpha}{r} \sum_{i \in S} (x a_i)\, b_i^\top, \qquad
    \mathcal L + \mu \sum_{i, j} | b_{past,i}^\top b_{new,j} |
    $$

    Every adapted weight has r experts and a router on the class token x_cls of its input. A sample votes for its
    ``active`` likeliest experts, softmax(R x_cls); S are the ``active`` experts with the most votes of the batch. After
    the task the ``merged`` experts with the most votes of all batches are merged, the others dropped: evaluation costs
    nothing and needs no task identity. While a task is open, ``eval()`` routes as training does, without counting, so a
    sample's output depends on its batch. The AGO loss keeps what new critical experts write orthogonal to what earlier
    tasks' merged ones do: averaged over the weights, for the ``merged`` experts that lead at the time. Of several
    processes each routes its own batches; what is merged has the most votes of all.

    Args:
        model: Any model with linear layers and samples along the first dimension of their inputs.
        config: [`DacConfig`][].

    Raises:
        ValueError: ``target_modules`` matches nothing; an attention layer is not batch first.

    Source: DAC, arXiv:2601.22828 (AAAI 2026): pool, routing by [CLS], vote, merging, AGO loss. From its public code
    (Fazhan-cs/DAC): 12 experts, 8 active, 4 merged, α = 1, weight 0.1, dropout 0.2; a router for each weight; the new
    experts of the AGO loss are those that lead; it is a sum over pairs, averaged over weights. Where that code departs
    from the paper we follow the paper: its hard choice gives the router no gradient, and its past experts are all 12 of
    a task, since the filter looks for their counts in the wrong place. Ours: the router learns by a straight-through
    estimator (the paper gives no formula). A text's class token is its end: the code reads the first one, which in a
    causal tower is the same for every text.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> method = Dac(model, DacConfig(r=6, target_modules="all-linear"))
        >>> method.before_task([], lambda model, batch: model(batch).sum())
        >>> sum(p.numel() for p in method.trainable_parameters())
        270
    """

    name: ClassVar[str] = "dac"
    keeps_beside: ClassVar[bool] = True
    config_type: ClassVar[type] = DacConfig
    config: DacConfig

    @public
    def __init__(self, model: nn.Module, config: DacConfig | None = None, **options: Any):
        self._require_kinds(model, config)
        with class_tokens_of(model) as (self.tokens, hooks):
            super().__init__(model, config, **options)
        self._hooks += hooks
        for slot in self.slots:
            slot.host.forward_mode = "factored"  # a merged weight has no gates
        self.past: list[Tensor] = [
            slot.weight.new_zeros(slot.weight.shape[0], 0, dtype=slot.exact_dtype) for slot in self.slots
        ]
        """By slot, the B ``[out, m]`` of the experts that were merged."""

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        generator, r = self.generator(), self.config.r
        pools = []
        for i, slot in enumerate(self.slots):
            (out, width), dtype = slot.weight.shape, slot.exact_dtype
            a, router = (kaiming((r, width), generator, dtype) for _ in range(2))
            pools.append(self.adapter_of(i, {"A": a, "B": torch.zeros(out, r, dtype=dtype), "router": router}))
        self.attach(pools)

    def adapter_of(self, i: int, tensors: Mapping[str, Tensor]) -> ExpertPool:
        pool = ExpertPool(
            tensors["A"], tensors["B"], tensors["router"], self.scaling_of(i), active=self.config.counts[0],
            tokens=self.tokens, tower=self.slots[i].target.tower, dropout=self.config.dropout,
        )  # fmt: skip
        pool.restore(tensors)
        return pool

    def penalty(self) -> Tensor | None:
        """The weighted AGO loss; None in the first task."""
        if not self.training_task or not self.tasks_learned or not self.config.ago_weight:
            return None
        leading = [pool.B[:, most_used(pool.counts, self.config.counts[1]).to(pool.B.device)] for pool in self._pools()]
        return self.config.ago_weight * ago_loss(self.past, leading)

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        for pool in self._pools():
            pool.counts = pool.counts.to(pool.router.device)
            processes().add(pool.counts)
        if not any(bool(pool.counts.any()) for pool in self._pools()):
            warn(
                "Dac: no batch was routed in train() mode, so no expert has a vote: the first of each layer are kept. "
                "Call model.train() before training."
            )
        kept = [pool.strongest(self.config.counts[1]) for pool in self._pools()]
        for slot, adapter in zip(self.slots, kept, strict=True):
            slot.detach()
            slot.attach(adapter)
        self.merge_adapters()
        self.past = [
            torch.cat([past, adapter.B.detach().to(past)], dim=1) for past, adapter in zip(self.past, kept, strict=True)
        ]

    def memory_state(self) -> State:
        return State({f"{slot.name}.past": past for slot, past in zip(self.slots, self.past, strict=True)})

    def recall(self, state: State) -> list[Tensor]:
        count = self.config.counts[1] * state.meta["tasks_learned"]
        return [stored(state, f"{slot.name}.past", [slot.weight.shape[0], count]) for slot in self.slots]

    def remember(self, memory: list[Tensor]) -> None:
        self.past = [past.to(slot.weight.device) for slot, past in zip(self.slots, memory, strict=True)]

    def _pools(self) -> list[ExpertPool]:
        pools = [slot.adapter for slot in self.slots]
        assert all(isinstance(pool, ExpertPool) for pool in pools)
        return pools  # type: ignore[return-value]
