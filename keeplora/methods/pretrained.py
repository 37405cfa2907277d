"""What pretraining put into the weights: the bases that are protected before the first task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from keeplora.lora import LoraSlot
from keeplora.math.lowrank import weight_basis

from .config import KeepLoraConfig
from .progress import for_all_layers

__all__ = ["weight_bases"]


def weight_bases(slots: Sequence[LoraSlot], config: KeepLoraConfig, *, shown: bool | None) -> list[Tensor]:
    """The leading singular vectors of every slot's weight, as many as ``weight_energy`` of its tower asks for."""

    def compute(group: list[int]) -> list[Tensor]:
        return weight_basis(
            [slots[i].exact_weight.detach() for i in group],
            [config.weight_energy_of(slots[i].target.tower) for i in group],
            side=config.weight_side,
        )

    return for_all_layers(slots, compute, "weights", shown=shown)
