"""SD-LoRA: the directions of earlier tasks' updates stay, their magnitudes are learned on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keeplora.lora import LoraAdapter

from .lora import LoraConfig, SequentialLora
from .method import LossFn
from .reading import stored
from .settings import check_range
from .state import State

__all__ = ["Directions", "SdLora", "SdLoraConfig"]


@dataclass(frozen=True)
class SdLoraConfig(LoraConfig):
    """Settings of [`SdLora`][], those of the public code: rank 10, scale 1.

    Args:
        magnitude: What the magnitude of a new task's update starts at.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    r: int = 10
    magnitude: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "magnitude", "[1e-6, inf)")


@dataclass(frozen=True)
class Directions:
    """What one layer remembers: the unit directions ``B_i A_i`` of its tasks, and their magnitudes.

    Attributes:
        a: ``[tasks · r, in]``, every task's A of Frobenius norm 1. b: ``[out, tasks · r]``, every task's B of norm 1.
        magnitudes: ``[tasks]``.
    """

    a: Tensor
    b: Tensor
    magnitudes: Tensor

    def with_update(self, a: Tensor, b: Tensor, magnitude: Tensor) -> Directions:
        """With the update ``magnitude · b a`` as one more direction, of magnitude ``magnitude ‖b‖ ‖a‖``."""
        lengths = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
        unit_a, unit_b = (t / n if n > 0 else t for t, n in zip((a, b), lengths, strict=True))
        grown = (magnitude * lengths[0] * lengths[1]).reshape(1)
        return Directions(
            torch.cat([self.a, unit_a]), torch.cat([self.b, unit_b], dim=1), torch.cat([self.magnitudes, grown])
        )


class ScaledDirections(LoraAdapter):
    """A new update and its magnitude, and how the magnitudes of earlier ones have changed since the task began.

    Args:
        a: As of [`LoraAdapter`][]; both are trained.
        b: As of [`LoraAdapter`][]; both are trained.
        scaling: As of [`LoraAdapter`][]; both are trained.
        dropout: As of [`LoraAdapter`][]; both are trained.
        before: What was known when the task began.
        magnitudes: ``[tasks + 1]``, those of the earlier updates and the new one's; trained.
    """

    before_a: Tensor
    before_b: Tensor
    before: Tensor

    def __init__(
        self, a: Tensor, b: Tensor, scaling: float, *, before: Directions, magnitudes: Tensor, dropout: float = 0.0
    ):
        super().__init__(a, b, scaling, train_a=True, dropout=dropout)
        self.register_buffer("before_a", before.a)
        self.register_buffer("before_b", before.b)
        self.register_buffer("before", before.magnitudes)
        self.magnitudes = nn.Parameter(magnitudes.detach().clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        """``(A, B)`` with the change of the weight ``c B A``: of old magnitudes, and the new update."""
        moved = (self.magnitudes[:-1] - self.before).repeat_interleave(len(self.A))
        new = self.magnitudes[-1] * self.B
        return torch.cat([self.before_a, self.A]), torch.cat([self.before_b * moved, new], dim=1)

    def plain(self) -> LoraAdapter:
        return LoraAdapter(*self.factors(), self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        a, b = self.factors()
        t = F.linear(x, a.to(x.dtype)) * self.scaling
        return F.linear(t, b.to(t.dtype))


class SdLora(SequentialLora):
    r"""Sequential LoRA in which a task may also rescale what earlier tasks learned, but not turn it.

    $$
    W_t = W_0 + s \sum_{i < t} \alpha_i \frac{B_i A_i}{\lVert B_i \rVert_F \lVert A_i \rVert_F}
    + s\, \alpha_t B_t A_t
    $$

    Trained are $A_t$, $B_t$ and all magnitudes $\alpha_1 \ldots \alpha_t$ of every layer. Updates are
    merged after each task; the change of an old magnitude is learned as a change from where it was, so that a task
    starts with the function the last one left. All directions are kept: ``4 r (in + out)`` bytes for each task and
    layer, and ``r (in + out)`` more multiplications per token and task in training. After it there is none of that.

    Source: Wu et al., "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning", ICLR 2025,
    arXiv:2501.13198. From the paper: the formula. From its public code (WuYichen-97/SD-Lora-CL): norms of B and A for
    the norm of their product, rank 10, scale 1, the new magnitude's start at 0.8. Here otherwise: a magnitude for each
    layer, which the code shares among all; old magnitudes go on from what they are, where the code starts all at 0.8
    again and so changes the function before the first step; all chosen layers rather than q and v.
    """

    name: ClassVar[str] = "sd-lora"
    config_type: ClassVar[type] = SdLoraConfig
    config: SdLoraConfig

    def __init__(self, model: nn.Module, config: SdLoraConfig | None = None, **options: Any):
        super().__init__(model, config, **options)
        self.directions = [_none(slot.weight) for slot in self.slots]

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        start, adapters = self.config.magnitude, []
        for i, (fresh, known) in enumerate(zip(self.fresh_factors(), self.directions, strict=True)):
            magnitudes = torch.cat([known.magnitudes, known.magnitudes.new_tensor([start])])
            before = {"before_a": known.a, "before_b": known.b, "before": known.magnitudes, "magnitudes": magnitudes}
            factors = {key: factor.to(known.a.device) for key, factor in fresh.items()}
            adapters.append(self.adapter_of(i, factors | before))
        self.attach(adapters)

    def adapter_of(self, i: int, tensors: Mapping[str, Tensor]) -> ScaledDirections:
        before = Directions(tensors["before_a"], tensors["before_b"], tensors["before"])
        magnitudes, tasks = tensors["magnitudes"], tensors["before"].numel()
        out, width = self.slots[i].weight.shape
        ranks = tasks * len(tensors["A"])
        shapes = [list(t.shape) for t in (before.a, before.b, before.magnitudes, magnitudes)]
        if shapes != [[ranks, width], [out, ranks], [tasks], [tasks + 1]]:
            raise ValueError(f"directions and magnitudes of {tasks} tasks and a new one, got shapes {shapes}")
        return ScaledDirections(
            tensors["A"], tensors["B"], self.scaling_of(i),
            before=before, magnitudes=magnitudes, dropout=self.config.dropout,
        )  # fmt: skip

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        learned: list[Directions] = []
        for slot, known in zip(self.slots, self.directions, strict=True):
            adapter = slot.adapter
            assert isinstance(adapter, ScaledDirections)
            magnitudes = adapter.magnitudes.detach()
            rescaled = Directions(known.a, known.b, magnitudes[:-1])
            learned.append(rescaled.with_update(adapter.A.detach(), adapter.B.detach(), magnitudes[-1]))
        self.merge_adapters()
        self.directions = learned

    def memory_state(self) -> State:
        tensors: dict[str, Tensor] = {}
        for slot, known in zip(self.slots, self.directions, strict=True):
            tensors |= {f"{slot.name}.{key}": getattr(known, key) for key in ("a", "b", "magnitudes")}
        return State(tensors)

    def recall(self, state: State) -> list[Directions]:
        tasks = state.meta["tasks_learned"]
        ranks, directions = self.config.r * tasks, []
        for slot in self.slots:
            out, width = slot.weight.shape
            shapes = {"a": (ranks, width), "b": (out, ranks), "magnitudes": (tasks,)}
            parts = {key: stored(state, f"{slot.name}.{key}", shape) for key, shape in shapes.items()}
            directions.append(Directions(**{key: tensor.to(slot.weight.device) for key, tensor in parts.items()}))
        return directions

    def remember(self, memory: list[Directions]) -> None:
        self.directions = memory


def _none(weight: Tensor) -> Directions:
    out, width = weight.shape
    zeros = (weight.new_zeros(shape, dtype=torch.float32) for shape in ((0, width), (out, 0), (0,)))
    return Directions(*zeros)
