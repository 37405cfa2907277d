"""LoRA on one task after the other, merged after each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .lora_method import ON_SHARES, LoraMethod
from .method import LossFn
from .settings import SEEDS, AdapterConfig, check_range, check_whole

__all__ = ["LoraConfig", "SequentialLora", "kaiming"]


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """Settings of [`SequentialLora`][]: those of every adapter, dropout of its inputs, and the seed of A."""

    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "dropout", "[0, 1)")
        check_whole(self, "seed", SEEDS)


class SequentialLora(LoraMethod):
    r"""Plain LoRA on one task after the other: a new adapter per task, merged after it.

    $$ y = x W^\top + \tfrac{\alpha}{r}\,(x A^\top) B^\top $$

    A starts Kaiming-uniform, B at zero; both are trained (Hu et al. 2022, arXiv:2106.09685; PEFT's defaults).
    """

    name: ClassVar[str] = "lora"
    config_type: ClassVar[type] = LoraConfig
    keeps_beside: ClassVar[bool] = True
    on_shares: ClassVar[frozenset[str]] = ON_SHARES
    config: LoraConfig
    train_a = True

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        self.attach([self.adapter_of(i, fresh) for i, fresh in enumerate(self.fresh_factors())])

    def fresh_factors(self) -> list[dict[str, Tensor]]:
        """An untrained A and B for every slot: their numbers follow from the seed and the number of tasks learned."""
        generator, r = self.generator(), self.config.r
        return [
            {"A": kaiming((r, width), generator, dtype), "B": torch.zeros(out, r, dtype=dtype)}
            for (out, width), dtype in ((slot.weight.shape, slot.exact_dtype) for slot in self.slots)
        ]

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        self.merge_adapters()


def kaiming(shape: tuple[int, int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Kaiming-uniform numbers, as PEFT starts A with them: the same float32 ones in each dtype."""
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator).to(dtype)
