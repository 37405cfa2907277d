"""O-LoRA: every task's adapter is pulled towards rows that are orthogonal to those of earlier tasks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .lora import LoraConfig, SequentialLora
from .lora_method import ON_SHARES
from .method import LossFn
from .reading import stored
from .settings import check_range
from .state import State

__all__ = ["OLora", "OLoraConfig", "overlap"]


@dataclass(frozen=True)
class OLoraConfig(LoraConfig):
    """Settings of [`OLora`][], those of the public code.

    Args:
        orthogonality: λ₁, the weight of the overlap with earlier tasks' A.
        decay: λ₂, the weight of the norms of the new A and B.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    r: int = 8
    alpha: float | None = 32.0
    dropout: float = 0.1
    orthogonality: float = 0.5
    decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "orthogonality", "[0, inf)")
        check_range(self, "decay", "[0, inf)")


def overlap(past: Tensor, a: Tensor) -> Tensor:
    r"""``Σ |A_past Aᵀ|`` over all elements: how far the rows of ``a [r, in]`` lean on those of ``past [R, in]``.

    Examples:
        >>> overlap(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor(3.)
    """
    return (past @ a.T).abs().sum()


class OLora(SequentialLora):
    r"""Sequential LoRA with a loss that keeps the rows of a new A orthogonal to those of every earlier A.

    $$
    \ell + \lambda_1 \sum_{l} \sum_{i < t} \lVert A_i^{(l)} A_t^{(l)\top} \rVert_{1}
    + \lambda_2 \sum_{l} (\lVert A_t^{(l)} \rVert_F + \lVert B_t^{(l)} \rVert_F)
    $$

    over all adapted layers l, with the sum of absolute elements as norm of the overlap. Earlier adapters are merged;
    their A are kept for the loss: ``4 r in`` bytes for each task and layer.

    Source: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", EMNLP 2023 (Findings),
    arXiv:2310.14152. From the paper: the idea, with a squared norm. From its public code (cmnfriend/O-LoRA): the sum of
    absolute values that it computes in its place, norms without a square at λ₂, λ₁ = 0.5, λ₂ = 0 (the code takes up to
    0.3 for late tasks), r 8, alpha 32, dropout 0.1. Here otherwise: all chosen layers rather than q and v.
    """

    name: ClassVar[str] = "o-lora"
    config_type: ClassVar[type] = OLoraConfig
    on_shares: ClassVar[frozenset[str]] = ON_SHARES | {"penalty"}
    config: OLoraConfig

    def __init__(self, model: nn.Module, config: OLoraConfig | None = None, **options: Any):
        super().__init__(model, config, **options)
        self.past: list[Tensor] = [slot.zeros(0, slot.weight.shape[1], dtype=torch.float32) for slot in self.slots]

    def penalty(self) -> Tensor | None:
        """λ₁ times the overlap, and λ₂ times the norms, of the open task; None where both are 0."""
        self._require("penalty", task=True)
        terms: list[Tensor] = []
        for slot, past in zip(self.slots, self.past, strict=True):
            adapter = slot.adapter
            assert adapter is not None
            if self.config.orthogonality and len(past):
                terms.append(self.config.orthogonality * overlap(past, adapter.A))
            if self.config.decay:
                norms = torch.linalg.vector_norm(adapter.A) + torch.linalg.vector_norm(adapter.B)
                terms.append(self.config.decay * norms)
        return torch.stack(terms).sum() if terms else None

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        learned = [slot.adapter.A.detach() for slot in self.slots if slot.adapter is not None]
        super().close_task(loader, loss_fn)
        self.past = [torch.cat([past, a]) for past, a in zip(self.past, learned, strict=True)]

    def memory_state(self) -> State:
        return State({f"{slot.name}.past_A": past for slot, past in zip(self.slots, self.past, strict=True)})

    def recall(self, state: State) -> list[Tensor]:
        rows = self.config.r * state.meta["tasks_learned"]
        return [stored(state, f"{slot.name}.past_A", (rows, slot.weight.shape[1])) for slot in self.slots]

    def remember(self, memory: list[Tensor]) -> None:
        self.past = [past.to(slot.weight.device) for slot, past in zip(self.slots, memory, strict=True)]
