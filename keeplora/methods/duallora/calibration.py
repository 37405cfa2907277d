"""Which task an image belongs to, by its features, and logits calibrated by it where classes of several are scored."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from keeplora.distributed import processes
from keeplora.families.class_head import ClassHead
from keeplora.math.lowrank import extend_basis
from keeplora.math.scale import powers, scaled
from keeplora.math.subspace import project

__all__ = ["ImageFeatures", "KnownTask", "TaskCalibration"]

_LEAST = 1e-3  # of a task's energy outside its basis: few images may leave none, and no distance is infinite


class KnownTask(nn.Module):
    """The prompts ``[classes, context]`` of one task, the basis U ``[d, k]`` of its image features and the share of
    their energy that is outside of U."""

    tokens: Tensor
    basis: Tensor

    def __init__(self, tokens: Tensor, basis: Tensor, rest: float):
        super().__init__()
        self.register_buffer("tokens", tokens.detach().clone())
        self.register_buffer("basis", basis.detach().clone())
        self.rest = float(rest)


class TaskCalibration(ClassHead):
    r"""Lowers the logits of classes whose task an image does not seem to belong to.

    $$
    d_\tau(f) = \frac{\lVert f - f\, U_\tau U_\tau^\top \rVert^2}{r_\tau\, \lVert f \rVert^2}, \quad
    p = \mathrm{softmax}(-d), \quad \kappa = 1 - \frac{H(p)}{\log T}, \quad
    z_c \leftarrow z_c - \beta\, \kappa\, \bigl(d_{\tau(c)} - \min_\sigma d_\sigma\bigr)
    $$

    d is the distance of the image feature f to the space that the features of each of T tasks fill, with the mean of
    the task's own images as the unit: r is the share of their energy outside of U. The classes of the likeliest task,
    and those no task has taught, stay as they are; with no confidence κ all do. Where all scored classes are of one
    task, nothing is changed. Only in ``eval()``.

    Args:
        strength: β.
    """

    def __init__(self, strength: float):
        super().__init__()
        self.strength = float(strength)
        self.tasks = nn.ModuleList()

    def known(self) -> list[KnownTask]:
        """The tasks learned so far, in order."""
        return [task for task in self.tasks if isinstance(task, KnownTask)]

    def distances(self, images: Tensor) -> Tensor:
        """d ``[n, tasks]`` of image features ``[n, d]``."""
        by_task = []
        with torch.autocast(images.device.type, enabled=False):
            for task in self.known():
                f = images.to(task.basis.dtype)
                outside = project(f, task.basis).square().sum(-1)
                by_task.append(outside / (task.rest * f.square().sum(-1)).clamp_min(torch.finfo(f.dtype).tiny))
        return torch.stack(by_task, dim=-1)

    def owners(self, tokens: Tensor) -> Tensor:
        """The task of each class ``[classes]``, −1 where none is known; of two with the same prompt the later."""
        places = {tuple(prompt): i for i, task in enumerate(self.known()) for prompt in task.tokens.tolist()}
        return torch.tensor([places.get(tuple(prompt), -1) for prompt in tokens.tolist()], device=tokens.device)

    def adjust(self, logits: Tensor, images: Tensor, tokens: Tensor) -> Tensor:
        if self.training or len(self.tasks) < 2 or not self.strength:
            return logits
        owners = self.owners(tokens)
        if bool((owners == owners[0]).all()):
            return logits
        distances = self.distances(images)
        log_p = (-distances).log_softmax(-1)
        confidence = 1 + (log_p.exp() * log_p).sum(-1, keepdim=True) / math.log(len(self.tasks))
        shift = self.strength * confidence * (distances.amin(-1, keepdim=True) - distances)
        return logits + torch.where(owners >= 0, shift[:, owners.clamp(min=0)], 0.0).to(logits.dtype)

    def add(self, features: ImageFeatures, energy: float) -> None:
        """Remember a task by what was observed of it; nothing if no logits were formed."""
        if features.moment is None:
            return
        [size] = powers("after_task", "image features", [features.moment])  # float32 may not hold their squares
        moment = scaled(features.moment, size).float()
        (extension,) = extend_basis([moment.new_zeros(len(moment), 0)], [moment], energy)
        self.tasks.append(
            KnownTask(torch.stack(list(features.prompts.values())), extension.q, max(1 - extension.fraction, _LEAST))
        )


class ImageFeatures:
    """Second moment of the image features and the prompts of the classes, gathered while logits are formed."""

    def __init__(self) -> None:
        self.moment: Tensor | None = None
        self.prompts: dict[tuple[int, ...], Tensor] = {}

    def add_up(self) -> None:
        """Of several processes, each with its share of the data: what all of them observed.

        Raises:
            ValueError: some have observed images and others none.
        """
        peers = processes()
        seen = peers.gather(list(self.prompts))
        if any(seen) and not all(seen):
            raise ValueError("after_task: every process must have a batch of the task, got some without one")
        if self.moment is None:
            return
        peers.add(self.moment)
        device = self.moment.device
        self.prompts = {prompt: torch.tensor(prompt, device=device) for theirs in seen for prompt in theirs}

    @torch.no_grad()
    def observe(self, images: Tensor, tokens: Tensor) -> None:
        """Add image features ``[n, d]`` and their classes' prompts ``[classes, context]``."""
        rows = images.double()
        part = rows.T @ rows
        self.moment = part if self.moment is None else self.moment + part
        for prompt, row in zip(tokens.tolist(), tokens, strict=True):
            self.prompts.setdefault(tuple(prompt), row.clone())
