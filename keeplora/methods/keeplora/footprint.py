"""How much memory KeepLoRA takes at every moment of a task's life, by formula: from shapes, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Footprint", "LayerShape"]


@dataclass(frozen=True)
class LayerShape:
    """One adapted weight ``[out, in]``.

    Attributes:
        rank: Of an adapter.
        protected: k₀, directions that the pretrained weight asks for.
        added: a, directions that each task adds.
        dtype_bytes: w, of the layer's dtype: 2 in half precision.
    """

    out: int
    width: int
    rank: int
    protected: int
    added: int = 0
    dtype_bytes: int = 2

    @property
    def numbers(self) -> int:
        return self.out * self.width

    @property
    def update(self) -> int:
        """Bytes of A and B."""
        return 4 * self.rank * (self.out + self.width)

    def history(self, tasks: int) -> int:
        """Bytes of all updates, or of their sum where that is smaller."""
        turns = tasks * self.rank * (self.out + self.width) > self.numbers
        return 4 * self.numbers if turns else tasks * self.update

    def bases(self, tasks: int) -> int:
        """Bytes of Q after that many tasks."""
        return 4 * self.width * min(self.protected + tasks * self.added, self.width)


@dataclass(frozen=True)
class Footprint:
    r"""Bytes beyond the model's own, of layers with inputs ``d``, outputs ``o``, rank ``r``, ``k`` directions in Q:

    $$
    \begin{aligned}
    \text{open task, device} &= \sum 4 r (o + d) \\
    \text{AdamW, device} &= \sum 8 r o \\
    \text{gradient in a step, device} &= \sum 4 r o \\
    \text{between tasks, device} &= 0 \\
    \text{host} &= \sum \bigl(4 d k + w o d\,[w < 4, t > 0] + t \cdot 4 r (o + d)\bigr) \\
    \text{disk} &= \sum \bigl(4 d k + t \cdot 4 r (o + d)\bigr)
    \end{aligned}
    $$

    after t tasks; past ``t r (o + d) > o d`` the updates' sum takes ``4 o d`` instead, and on the disk of a model in
    float32 the weight as much again. Activations are the model's own. Updates that are kept beside weights
    (``kept``) take the place of copies of these: on the device ``Σ kept t r (o + d)``, or ``Σ kept o d``.

    Examples:
        >>> one = Footprint([LayerShape(4096, 4096, rank=16, protected=900)])
        >>> round(one.training() / 4096**2, 3), round(one.host(8) / 4096**2, 2), round(one.disk(8) / 4096**2, 2)
        (0.062, 3.13, 1.13)
    """

    layers: Sequence[LayerShape]
    kept: int = 0
    """Bytes of a number, on the device, of updates that are kept beside weights; 0 where they are merged."""

    def beside(self, tasks: int) -> int:
        """All updates that are kept beside weights, or their sums, on the device: there from the first forward on."""
        return sum(self.kept * layer.history(tasks) // 4 for layer in self.layers)

    def open_task(self) -> int:
        """A and B of every layer, on the device."""
        return sum(layer.update for layer in self.layers)

    def training(self) -> int:
        """Between two steps, gradients set to None: adapters and AdamW's two moments of B, on the device."""
        return self.open_task() + sum(8 * layer.rank * layer.out for layer in self.layers)

    def host(self, tasks: int) -> int:
        """Bases, pretrained weights in half precision, and updates, in main memory."""
        merged = [x for x in self.layers if x.dtype_bytes < 4 and not self.kept]
        starts = sum(x.dtype_bytes * x.numbers for x in merged) if tasks else 0
        return starts + sum(layer.bases(tasks) + layer.history(tasks) for layer in self.layers)

    def disk(self, tasks: int, *, open_task: bool = False) -> int:
        """A saved state."""
        kept = sum(layer.bases(tasks) + layer.history(tasks) for layer in self.layers)
        turned = [x for x in self.layers if x.dtype_bytes >= 4 and x.history(tasks) < tasks * x.update]
        return kept + (0 if self.kept else sum(4 * x.numbers for x in turned)) + (self.open_task() if open_task else 0)

    def switch(self, memory_budget: int) -> int:
        """Most that a task switch takes on the device, besides activations: the budget, or what one layer takes."""
        return max(memory_budget, max(self.workspace(layer) for layer in self.layers))

    @staticmethod
    def workspace(layer: LayerShape) -> int:
        """Of one layer alone, at most: its moment and the eigenvectors of that, or of its weight's Gram matrix, in
        float64; or the weight, its exact value and its change in float64, while an update is merged."""
        side = min(layer.out, layer.width)
        moment = 44 * layer.width**2
        weight = 32 * side**2 + 8 * layer.numbers
        return max(moment, weight, 32 * layer.numbers)
