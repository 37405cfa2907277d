"""What the peers have in common: PEFT is there, the rank fits, random numbers are the task's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.families.coverage import Targets
from keeplora.lora import Target, target_shape
from keeplora.ops.precision import full_precision

from ..lora import SequentialLora
from ..progress import for_all_layers
from .stand_in import Prepare, peft_factors, require_peft
from .started import StartedAdapter

__all__ = ["Peer", "SubtractedStart"]

Factors = Mapping[str, Tensor]
"""Tensors of one adapter, as its ``tensors()`` gives them."""


class Peer(SequentialLora):
    """A new adapter per task, merged after it, that PEFT's code starts.

    Raises:
        ImportError: PEFT is not installed, or too old.
        ValueError: r is larger than what the smaller side of a weight has room for.
    """

    directions: ClassVar[int] = 1
    """How many singular directions of a weight, or of its gradient, a rank of 1 takes."""

    def __init__(self, model: nn.Module, config: Any = None, **options: Any):
        require_peft(type(self).__name__)
        super().__init__(model, config, **options)
        for slot in self.slots:
            slot.host.forward_mode = "factored"  # A, or both, are trained

    def choose_targets(self, targets: Sequence[Target] | None) -> Targets:
        chosen = super().choose_targets(targets)
        for target in chosen:
            shape = target_shape(self.model, target)
            if shape is None:
                continue  # wrap says what is wrong with it
            most = min(shape) // self.directions
            if self.config.r > most:
                raise ValueError(
                    f"{type(self).__name__}: r must be at most {most}, got {self.config.r} for a weight {[*shape]} "
                    f"[{target.name}]: each of r takes {self.directions} of its {min(shape)} singular directions. "
                    "Lower r."
                )
        return chosen

    def attach_started(self, start: Callable[[int], Factors | None]) -> None:
        """Attach what ``start(i)`` gives for every slot; it may draw from the global generators, which are put back."""
        with self.seeded():
            made = for_all_layers(self.slots, lambda group: map(start, group), "starts", shown=self.progress)
        self.attach_all(made)

    def attach_all(self, made: Sequence[Factors | None]) -> None:
        """An adapter of its factors in every slot that has some."""
        self.attach([None if factors is None else self.adapter_of(i, factors) for i, factors in enumerate(made)])

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """The global generators begin at the task's seed, and are put back; products are in full precision."""
        devices = {slot.weight.device for slot in self.slots}
        cuda = [device for device in devices if device.type == "cuda"]
        seed = self.generator().initial_seed()
        with torch.random.fork_rng(cuda), full_precision(*devices):
            torch.default_generator.manual_seed(seed)
            for device in cuda:  # and of no other GPU
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield

    def peft_factors(self, i: int, prepare: Prepare | None = None, **settings: Any) -> Factors:
        """A and B of slot i as PEFT starts them with these settings, in the dtype of exact weights."""
        config, weight = self.config, self.slots[i].exact_weight
        alpha = config.r if config.alpha is None else config.alpha
        a, b = peft_factors(weight, prepare, r=config.r, lora_alpha=alpha, use_rslora=config.rslora, **settings)
        return {"A": a.to(weight.dtype), "B": b.to(weight.dtype)}


class SubtractedStart(Peer):
    """A peer whose start PEFT takes out of the frozen weight; here the update counts from it."""

    def subtracted(self, factors: Factors) -> Factors:
        """With A₀ and B₀ beside A and B."""
        return {**factors, "start": factors["A"], "origin": factors["B"]}

    def adapter_of(self, i: int, tensors: Factors) -> StartedAdapter:
        return StartedAdapter(
            tensors["A"], tensors["B"], self.scaling_of(i),
            start=tensors["start"], origin=tensors["origin"], dropout=self.config.dropout,
        )  # fmt: skip
