"""MiCA: only A is trained, and B writes along the minor left singular vectors of the weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from keeplora.lora import LoraAdapter

from ..lora import LoraConfig
from ..method import LossFn
from .peer import Factors, Peer

__all__ = ["Mica", "MicaConfig"]


@dataclass(frozen=True)
class MicaConfig(LoraConfig):
    """Settings of [`Mica`][], those of plain LoRA. Scale 1; no numbers of the paper are taken over."""


class Mica(Peer):
    r"""Minor component adaptation, anew in every task.

    $$
    W = U \Sigma V^\top, \qquad B = U_{[:,\,-r:]} \text{ (frozen)}, \qquad A = 0 \text{ (trained)}, \qquad
    W \leftarrow W + s\, B A
    $$

    An update writes where the weight, with all earlier tasks merged, writes least. It needs no data and keeps nothing;
    one singular value decomposition per weight and task.

    Raises:
        ImportError: PEFT is not installed, or too old.
        ValueError: r is larger than the smaller side of a weight.

    Source: MiCA, arXiv:2604.01694, as PEFT has it (``init_lora_weights="mica"``). Here otherwise: a task is started
    from the weight the last one left; the paper adapts once.

    Examples:
        >>> from torch import nn
        >>> method = Mica(nn.Sequential(nn.Linear(8, 6)), MicaConfig(r=2, target_modules="all-linear"))
        >>> method.before_task([], lambda model, batch: model(batch).sum())
        >>> [p.shape[1] for p in method.trainable_parameters()]
        [8]
    """

    name: ClassVar[str] = "mica"
    config_type: ClassVar[type] = MicaConfig
    config: MicaConfig

    def open_task(self, loader: Iterable[object], loss_fn: LossFn) -> None:
        self.attach_started(lambda i: self.peft_factors(i, init_lora_weights="mica"))

    def adapter_of(self, i: int, tensors: Factors) -> LoraAdapter:
        adapter = super().adapter_of(i, tensors)
        adapter.B.requires_grad_(False)
        return adapter
