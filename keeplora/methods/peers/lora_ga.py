"""LoRA-GA: adapters start along the singular directions of the task's gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from keeplora.distributed import processes
from keeplora.statistics import mean_gradients

from ..lora import LoraConfig
from ..method import LossFn
from ..progress import progress
from ..settings import check_choice, check_whole
from .peer import Factors, SubtractedStart
from .stand_in import LAYER

__all__ = ["LoraGa", "LoraGaConfig"]


@dataclass(frozen=True)
class LoraGaConfig(LoraConfig):
    """Settings of [`LoraGa`][], PEFT's.

    Args:
        direction: Which singular directions of the gradient A and B get: ``ArB2r``, ``A2rBr``, ``ArBr`` or ``random``.
        init_scale: ``stable``, ``weight_svd``, ``gd_scale`` or ``unit``.
        stable_gamma: γ of ``stable``.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    init_scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "direction", ("ArBr", "A2rBr", "ArB2r", "random"))
        check_choice(self, "init_scale", ("stable", "weight_svd", "gd_scale", "unit"))
        check_whole(self, "stable_gamma", "[1, inf)")


class LoraGa(SubtractedStart):
    r"""Low-rank adaptation with gradient approximation, anew in every task.

    $$
    G = U \Sigma V^\top, \qquad A_0 = V_{[:,\,:r]}^\top, \qquad
    B_0 = \tfrac{out^{1/4}}{\sqrt\gamma}\, U_{[:,\,r:2r]}\, \Sigma_{r:2r}, \qquad
    W \leftarrow W + s\,(B A - B_0 A_0)
    $$

    with G the mean gradient of the weight over the task's data, in one pass before the task. Both factors are trained.
    Nothing is kept between tasks, and nothing of earlier tasks is protected.

    Raises:
        ImportError: PEFT is not installed, or too old.
        ValueError: r is larger than half the smaller side of a weight; what
            [`mean_gradients`][] raises.

    Source: Wang et al., "LoRA-GA", NeurIPS 2024, arXiv:2407.05000, as PEFT has it (``preprocess_loraga``): there B₀ is
    scaled by the gradient's singular values, and A₀ is not scaled, where the public code's ``stable`` scales both by
    ``out^¼/√γ`` and takes no singular values. Ours: the gradient of all batches of the pass; the paper takes some.

    Examples:
        >>> model, data = nn.Sequential(nn.Linear(8, 6)), [torch.randn(16, 8)]
        >>> method = LoraGa(model, LoraGaConfig(r=2, target_modules="all-linear"))
        >>> before = model(data[0])
        >>> method.before_task(data, lambda model, batch: model(batch).square().mean())
        >>> torch.equal(model(data[0]), before)
        True
    """

    name: ClassVar[str] = "lora-ga"
    config_type: ClassVar[type] = LoraGaConfig
    config: LoraGaConfig
    directions = 2

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        from peft import LoraGAConfig, preprocess_loraga

        reached: set[str] = set()
        with progress(loader, "gradients", "batch", shown=self.progress) as batches:
            gradients = mean_gradients(
                self.model, self.slots, batches, loss_fn,
                batch_size=self._batch_size, peers=processes(), reached=reached,
            )  # fmt: skip
        self.warn_of_unreached([slot.name in reached for slot in self.slots])

        own = self.config
        peft_config = LoraGAConfig(direction=own.direction, scale=own.init_scale, stable_gamma=own.stable_gamma)

        def start(i: int) -> Factors | None:
            if self.slots[i].name not in reached:
                return None

            def prepare(model: Any, config: Any) -> None:
                preprocess_loraga(model, config, lambda: _backward(model[LAYER], gradients[i].float()))

            settings = {"init_lora_weights": "lora_ga", "lora_ga_config": peft_config}
            return self.subtracted(self.peft_factors(i, prepare, **settings))

        self.attach_started(start)


def _backward(layer: nn.Module, gradient: Tensor) -> None:
    """A backward pass that leaves this gradient in the layer's weight."""
    identity = torch.eye(gradient.shape[1], device=gradient.device, requires_grad=True)
    (layer(identity) * gradient.T).sum().backward()
