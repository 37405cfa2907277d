"""LoRA on one task after the other, merged after each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.lora import LoraAdapter

from .lora_method import LoraMethod
from .method import LossFn
from .settings import SEEDS, AdapterConfig, check_range, check_whole

__all__ = ["LoraConfig", "SequentialLora"]


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """Settings of :class:`SequentialLora`: those of every adapter, dropout of its inputs, and the seed of A."""

    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "dropout", "[0, 1)")
        check_whole(self, "seed", SEEDS)


class SequentialLora(LoraMethod):
    r"""Plain LoRA on one task after the other: a new adapter per task, merged after it.

    .. math:: y = x W^\top + \tfrac{\alpha}{r}\,(x A^\top) B^\top

    A starts Kaiming-uniform, B at zero; both are trained (Hu et al. 2022, arXiv:2106.09685; PEFT's defaults).
    """

    name: ClassVar[str] = "lora"
    config: LoraConfig

    def __init__(self, model: nn.Module, config: LoraConfig | None = None, **options: Any):
        self.config = config or LoraConfig()
        super().__init__(model, self.config, **options)

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        self.attach(self.fresh_adapters())

    def fresh_adapters(self) -> list[LoraAdapter]:
        """An untrained adapter for every slot: its numbers follow from the seed and the number of tasks learned."""
        generator = torch.Generator().manual_seed(self.config.seed * 1009 + self.tasks_learned)
        adapters = []
        for slot in self.slots:
            out, width = slot.weight.shape
            a = torch.empty(self.config.r, width)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            adapters.append(self.adapter(a, torch.zeros(out, self.config.r)))
        return adapters

    def adapter(self, a: Tensor, b: Tensor) -> LoraAdapter:
        config = self.config
        return LoraAdapter(a, b, config.scaling, train_a=True, dropout=config.dropout)

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        self.merge_adapters()
