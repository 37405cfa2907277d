"""How much memory KeepLoRA takes at every moment of a task's life, by formula: from shapes, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keeplora.math.factorise import plan_for

__all__ = ["Footprint", "LayerShape"]


@dataclass(frozen=True)
class LayerShape:
    """One adapted weight ``[out, in]``.

    Attributes:
        rank: Of an adapter.
        protected: k₀, directions that the pretrained weight asks for.
        added: a, directions that each task adds. already: That tasks have added, where they are counted one by one.
        dtype_bytes: w, of the layer's dtype: 2 in half precision.
    """

    out: int
    width: int
    rank: int
    protected: int
    added: int = 0
    already: int = 0
    dtype_bytes: int = 2

    @property
    def numbers(self) -> int:
        return self.out * self.width

    @property
    def update(self) -> int:
        """Bytes of A and B."""
        return 4 * self.rank * (self.out + self.width)

    @property
    def start(self) -> int:
        """Bytes of the pretrained weight, where it is kept beside the layer's."""
        return self.dtype_bytes * self.numbers if self.dtype_bytes < 4 else 0

    def history(self, tasks: int) -> int:
        """Bytes of all updates, or of their sum where that is smaller."""
        turns = tasks * self.rank * (self.out + self.width) > self.numbers
        return 4 * self.numbers if turns else tasks * self.update

    def basis(self, tasks: int) -> int:
        """Bytes of Q after that many tasks: in float16 what a weight of fewer than 32 bits asks for."""
        return self.width * ((2 if self.dtype_bytes < 4 else 4) * self.protected + 4 * self.of_tasks(tasks))

    def of_tasks(self, tasks: int) -> int:
        """Directions in Q that are not the weight's."""
        return min(self.already + tasks * self.added, self.width - self.protected)

    def weight_work(self) -> int:
        """What finding the basis of the weight takes, at most: its exact value, and its Gram matrix and the
        eigenvectors of that in float64."""
        return 32 * min(self.out, self.width) ** 2 + (4 * self.numbers if self.dtype_bytes < 4 else 0)

    def seek_work(self, rows: int, tasks: int) -> int:
        """What finding the directions of a gradient of that many rows takes: a copy that is scaled where it is small,
        Q, and blocks of subspace iteration with their images."""
        q = 4 * self.width * (self.protected + self.of_tasks(tasks))
        return 4 * rows * self.width + q + 144 * self.rank * (self.out + self.width)

    def moment_work(self, *, whole: bool = True) -> int:
        """What extending the basis takes, the moment itself included.

        Args:
            whole: Whether subspace iteration gives up, which is tried from 1536 inputs on: then eigenvectors of the
                whole moment in float64; else what two more copies of it take.
        """
        iterates = self.width >= plan_for("cuda").iterative_from
        return (44 if whole or not iterates else 12) * self.width**2

    def merge_work(self, *, kept: bool = False) -> int:
        """What merging an update and measuring its change takes: the weight as it was, and the change in float64.

        Args:
            kept: Whether it is kept beside the weight: then that is read in float32, to tell the update's size.
        """
        return 4 * self.numbers if kept else (8 + self.dtype_bytes) * self.numbers


@dataclass(frozen=True)
class Footprint:
    r"""Bytes beyond the model's own, of layers with inputs ``d``, outputs ``o`` and rank ``r``.

    Q has ``k₀`` directions of the weight, in u bytes a number (2 of weights in half precision, else 4), and ``k`` of
    the tasks:

    $$
    \begin{aligned}
    \text{open task, device} &= \sum 4 r (o + d) \\
    \text{AdamW, device} &= \sum 8 r o \\
    \text{gradient in a step, device} &= \sum 4 r o \\
    \text{between tasks, device} &= 0 \\
    \text{host} &= \sum \bigl(u d k_0 + 4 d k + w o d\,[w < 4, t > 0] + t \cdot 4 r (o + d)\bigr) \\
    \text{disk} &= \sum \bigl(u d k_0 + 4 d k + t \cdot 4 r (o + d)\bigr)
    \end{aligned}
    $$

    after t tasks; past ``t r (o + d) > o d`` the updates' sum takes ``4 o d`` instead, and on the disk of a model in
    float32 the weight as much again. Activations are the model's own. Updates that are kept beside weights
    (``kept``) take the place of copies of these: on the device ``Σ kept t r (o + d)``, or ``Σ kept o d``.

    Examples:
        >>> one = Footprint([LayerShape(4096, 4096, rank=16, protected=900)])
        >>> round(one.training() / 4096**2, 3), round(one.host(8) / 4096**2, 2), round(one.disk(8) / 4096**2, 2)
        (0.062, 2.69, 0.69)
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

    def gradients(self) -> int:
        """Of B, on the device in a step."""
        return sum(4 * layer.rank * layer.out for layer in self.layers)

    def training(self) -> int:
        """Between two steps, gradients set to None: adapters and AdamW's two moments of B, on the device."""
        return self.open_task() + 2 * self.gradients()

    def bases(self, tasks: int) -> int:
        """Q of every layer, in main memory and on disk."""
        return sum(layer.basis(tasks) for layer in self.layers)

    def starts(self, tasks: int) -> int:
        """Pretrained weights in half precision, in main memory from the first merge on."""
        return sum(layer.start for layer in self.layers) if tasks and not self.kept else 0

    def updates(self, tasks: int) -> int:
        """All updates, or their sums, in main memory and on disk."""
        return sum(layer.history(tasks) for layer in self.layers)

    def host(self, tasks: int) -> int:
        """Everything in main memory."""
        return self.bases(tasks) + self.starts(tasks) + self.updates(tasks)

    def disk(self, tasks: int, *, open_task: bool = False) -> int:
        """A saved state."""
        turned = [x for x in self.layers if x.dtype_bytes >= 4 and x.history(tasks) < tasks * x.update]
        weights = 0 if self.kept else sum(4 * x.numbers for x in turned)
        return self.bases(tasks) + self.updates(tasks) + weights + (self.open_task() if open_task else 0)

    def opening(self) -> int:
        """What the largest layer takes on the device while bases of weights are found, before the first task."""
        return max((layer.weight_work() for layer in self.layers), default=0)

    def closing(self, moments: int, budget: int | None = None, *, whole: bool = True) -> int:
        """Most that the end of a task takes on the device, besides activations.

        Args:
            moments: Bytes of the moments of all layers.
            budget: ``memory_budget``: where moments and work need more, there are several passes. None: no bound.
            whole: As of [`LayerShape.moment_work`][]; the budget reckons with work that is less.
        """
        alone = max((x.moment_work(whole=False) for x in self.layers), default=0)
        most = moments + max((x.moment_work(whole=False) - 4 * x.width**2 for x in self.layers), default=0)
        if budget is not None and most > budget:
            most = max(budget, alone)
        if whole:
            most += max((x.moment_work() for x in self.layers), default=0) - alone
        return max(most, max((layer.merge_work(kept=self.kept > 0) for layer in self.layers), default=0))

    def switch(self, memory_budget: int) -> int:
        """Most that a task switch takes on the device, besides activations: the budget, or what one layer takes."""
        merging = max(x.merge_work(kept=self.kept > 0) for x in self.layers)
        least = max(merging, *(max(x.moment_work(), x.weight_work()) for x in self.layers))
        return max(memory_budget, least)
