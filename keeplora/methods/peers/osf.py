"""OSF: whole weights, trained outside the leading singular directions that they had when the task began."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.ops.precision import full_precision

from ..lora_method import LoraMethod
from ..method import LossFn
from ..progress import for_all_layers
from ..settings import Settings, check_flag, check_names, check_range
from .stand_in import require_peft
from .started import StartedAdapter

__all__ = ["MinorFactors", "Osf", "OsfConfig"]


@dataclass(frozen=True)
class OsfConfig(Settings):
    """Settings of [`Osf`][].

    Args:
        effective_rank: Share of a weight's singular directions that the first task leaves as they are.
        rank_step: What every later task adds to that share; one direction at least is always trained.
        target_modules: Names of the layers whose weights are trained, as for the LoRA methods.
        frozen_buffers: Whether running statistics and all other buffers stay as they are while a task is learned.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    effective_rank: float = 0.5
    rank_step: float = 0.05
    target_modules: tuple[str, ...] | str = ("attn",)
    frozen_buffers: bool = True

    def __post_init__(self) -> None:
        check_range(self, "effective_rank", "[0, 1]")
        check_range(self, "rank_step", "[0, 1]")
        check_names(self, "target_modules")
        check_flag(self, "frozen_buffers")


class MinorFactors(StartedAdapter):
    r"""The minor singular triples of a weight, all three factors trained.

    $$
    \Delta W = U S V - U_0 S_0 V_0, \qquad \nabla_U \leftarrow (I - H_u H_u^\top) \nabla_U, \qquad
    \nabla_V \leftarrow \nabla_V (I - H_v^\top H_v)
    $$

    Args:
        a: V ``[q, in]``.
        b: U ``[out, q]``.
        s: S ``[q]``.
        start: V₀, from which a counts.
        origin: U₀ S₀, from which the product of b and s counts.
        high_u: the leading directions ``[out, k]``, which stay.
        high_v: the leading directions ``[k, in]``, which stay.
    """

    high_u: Tensor
    high_v: Tensor

    def __init__(
        self, a: Tensor, b: Tensor, s: Tensor, *, start: Tensor, origin: Tensor, high_u: Tensor, high_v: Tensor
    ):
        super().__init__(a, b, 1.0, start=start, origin=origin)
        self.S = nn.Parameter(s.detach().clone())
        self.register_buffer("high_u", high_u.detach().clone(memory_format=torch.contiguous_format))
        self.register_buffer("high_v", high_v.detach().clone(memory_format=torch.contiguous_format))

    def trained(self) -> tuple[Tensor, Tensor]:
        """V and U S; gradients arrive projected, values are untouched."""
        with torch.autocast(self.A.device.type, enabled=False):
            turn_u, turn_v = self.B - self.B.detach(), self.A - self.A.detach()  # 0, with a gradient
            u = self.B.detach() + (turn_u - self.high_u @ (self.high_u.T @ turn_u))
            v = self.A.detach() + (turn_v - (turn_v @ self.high_v.T) @ self.high_v)
        return v, u * self.S


class Osf(LoraMethod):
    r"""Orthogonal subspace fine-tuning: a decomposition of every weight, anew in every task.

    $$
    W = U_H S_H V_H + U S V, \qquad k = \lfloor (\varepsilon + \delta t) \min(out, in) \rfloor \text{ leading
    triples are frozen,} \qquad W \leftarrow U_H S_H V_H + U S V
    $$

    U, S and V of the minor triples are trained; gradients of U and V lose their part in the frozen directions. What was
    learned becomes part of the next task's decomposition: nothing is kept, no data is looked at. While a task is open,
    ``8 (min(out, in) − k/2) (out + in)`` bytes per weight are held, and the optimizer's two numbers for each that is
    trained: more than full fine-tuning holds. One full singular value decomposition per weight and task. An optimizer
    that rescales elements, and weight decay, leave the free directions, as in PEFT.

    Raises:
        ImportError: PEFT is not installed, or too old.

    Source: Nayak et al., "Sculpting Subspaces", ICLR 2026, arXiv:2504.07097, as PEFT has it (``OSFConfig``): the
    decomposition, projected gradients, half of the directions frozen, a share that grows from task to task. The paper
    chooses a share per layer by how alike its inputs and outputs are, which PEFT leaves out. Ours: the step, 0.05.

    Examples:
        >>> method = Osf(nn.Sequential(nn.Linear(8, 6)), OsfConfig(target_modules="all-linear"))
        >>> method.before_task([], lambda model, batch: model(batch).sum())
        >>> sorted(list(p.shape) for p in method.trainable_parameters())
        [[3], [3, 8], [6, 3]]
    """

    name: ClassVar[str] = "osf"
    config_type: ClassVar[type] = OsfConfig
    config: OsfConfig

    def __init__(self, model: nn.Module, config: OsfConfig | None = None, **options: Any):
        require_peft(type(self).__name__)
        super().__init__(model, config, **options)
        for slot in self.slots:
            slot.host.forward_mode = "factored"  # all factors are trained

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        from peft.tuners.osf.utils import decompose_weight_matrix

        share = self.config.effective_rank + self.config.rank_step * self.tasks_learned

        def split(i: int) -> dict[str, Tensor]:
            weight = self.slots[i].exact_weight.detach()
            small = min(weight.shape)
            parts = decompose_weight_matrix(weight, min(int(share * small), small - 1))
            u, s, v = (parts[f"{name}_low"].detach() for name in "USV")
            high = {"high_u": parts["U_high"], "high_v": parts["V_high"]}
            return {"A": v, "B": u, "S": s, "start": v, "origin": u * s, **high}

        with full_precision(*{slot.weight.device for slot in self.slots}):
            made = for_all_layers(self.slots, lambda group: map(split, group), "weights", shown=self.progress)
        self.attach([self.adapter_of(i, tensors) for i, tensors in enumerate(made)])

    def adapter_of(self, i: int, tensors: Mapping[str, Tensor]) -> MinorFactors:
        a, b, s, high_u, high_v = (tensors[key] for key in ("A", "B", "S", "high_u", "high_v"))
        (out, width), q, k = self.slots[i].weight.shape, len(a), min(self.slots[i].weight.shape) - len(a)
        shapes = [list(t.shape) for t in (a, b, s, high_u, high_v)]
        if shapes != [[q, width], [out, q], [q], [out, k], [k, width]]:
            raise ValueError(f"factors of {q} minor and {k} leading directions, got shapes {shapes}")
        start, origin = tensors["start"], tensors["origin"]
        return MinorFactors(a, b, s, start=start, origin=origin, high_u=high_u, high_v=high_v)

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        for slot in self.slots:
            slot.forget()  # an adapter of what is merged would be larger than the weight
        self.merge_adapters()
