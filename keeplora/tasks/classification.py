"""Classification tasks of image–text models: data, batches, loss and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keeplora.families.class_head import ImageTextModel, adjusted_logits, class_head

from .sequence import TaskSequence
from .workload import Batches

MEAN, STD = 0.5, 0.3
SplitName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Split:
    """Images uint8 [n, 3, H, W] and labels int64 [n]."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or self.images.shape[1] != 3:
            raise ValueError(
                "Split: images must be uint8 [n, 3, H, W], "
                f"got {self.images.dtype} {list(self.images.shape)}. Convert them before."
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"Split: labels must be int64 [{len(self.images)}], "
                f"got {self.labels.dtype} {list(self.labels.shape)}. Give one label per image."
            )

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Task:
    """A classification task: one text per class, three disjoint splits.

    `prompts[c]` describes class `c`; `tokens` are the tokenized prompts, int64 [classes, context].
    """

    name: str
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    tokens: Tensor
    train: Split
    validation: Split
    test: Split

    def __post_init__(self) -> None:
        n = len(self.classes)
        if n < 2 or len(self.prompts) != n or self.tokens.dim() != 2 or len(self.tokens) != n:
            raise ValueError(
                f"Task: prompts and tokens must have one row per class, at least two, got {n} classes, "
                f"{len(self.prompts)} prompts and tokens {list(self.tokens.shape)} in task {self.name!r}."
            )
        for part in get_args(SplitName):
            labels = self.split(part).labels
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < n:
                raise ValueError(
                    f"Task: labels must lie in [0, {n}), got {int(labels.min())} to {int(labels.max())} "
                    f"in {part} of task {self.name!r}."
                )

    def split(self, name: SplitName) -> Split:
        """The split called `train`, `validation` or `test`."""
        if name not in get_args(SplitName):
            raise ValueError(f"Task.split: name must be 'train', 'validation' or 'test', got {name!r}.")
        return cast(Split, getattr(self, name))

    def thinned(self, most: int) -> Task:
        """The task with evenly spaced images of its validation and test splits, at most ``most`` of each."""

        def fewer(split: Split) -> Split:
            every = -(-len(split) // most)
            return Split(split.images[::every], split.labels[::every])

        return replace(self, validation=fewer(self.validation), test=fewer(self.test))


class Batch(NamedTuple):
    """One step's data: images uint8 [n, 3, H, W], labels int64 [n], tokens of all classes int64 [classes, context]."""

    images: Tensor
    labels: Tensor
    tokens: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return Batch(self.images.to(device), self.labels.to(device), self.tokens.to(device))


def normalize(images: Tensor) -> Tensor:
    """(x / 255 − 0.5) / 0.3 as float32, for uint8 images of any shape.

    Raises:
        TypeError: the images are not uint8.

    Examples:
        >>> normalize(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([-1.6667,  1.6667])
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"normalize: images must be uint8, got {images.dtype}. Normalise images only once.")
    return images.float().div_(255 * STD).sub_(MEAN / STD)


class Loader:
    """Batches of a split in a new order every epoch, fixed by (seed, epoch); see `loader`."""

    def __init__(
        self, split: Split, tokens: Tensor, batch_size: int, *, seed: int, shuffle: bool, drop_last: bool
    ) -> None:
        self.split, self.tokens, self.batch_size = split, tokens, batch_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.arange(len(self.split))
        if self.shuffle:
            # Mixing by a large odd factor keeps (seed, epoch) pairs apart without a second generator.
            generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + self.epoch) % 2**63)
            order = torch.randperm(len(self.split), generator=generator)
        self.epoch += 1
        device = self.split.images.device
        for step in range(len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size].to(device)
            yield Batch(self.split.images[chosen], self.split.labels[chosen], self.tokens)


def loader(
    split: Split, tokens: Tensor, batch_size: int, *, seed: int, shuffle: bool = True, drop_last: bool = False
) -> Loader:
    """Batches of a split, to be iterated once per epoch.

    Every iteration is one epoch in its own order, which depends on `(seed, epoch)` alone; the attribute `epoch` counts
    iterations begun and may be set, to continue a run. The object has a length (batches per epoch) and can be pickled.

    Raises:
        ValueError: the batch size is not positive, or the split would give no batch.

    Examples:
        >>> split = Split(torch.zeros(5, 3, 32, 32, dtype=torch.uint8), torch.arange(5))
        >>> [len(batch.labels) for batch in loader(split, torch.zeros(5, 4, dtype=torch.int64), 2, seed=0)]
        [2, 2, 1]
    """
    if batch_size < 1:
        raise ValueError(f"loader: batch_size must be at least 1, got {batch_size}.")
    made = Loader(split, tokens, batch_size, seed=seed, shuffle=shuffle, drop_last=drop_last)
    if len(made) == 0:
        raise ValueError(
            f"loader: split must give at least one batch, got {len(split)} images for batches of {batch_size}. "
            "Use a smaller batch_size or drop_last=False."
        )
    return made


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of exp(logit_scale) · ⟨image, text of each class⟩, averaged over the batch: a scalar.

    Images are normalised here. All classes' texts are encoded in every step, so the text tower is trained too. Where a
    method has put a head on the model, its say is part of the logits.

    Examples:
        >>> from keeplora.tasks.embedded import load_model, load_tasks
        >>> tasks, _ = load_tasks(["digits"])
        >>> batch = next(iter(loader(tasks[0].train, tasks[0].tokens, 8, seed=0)))
        >>> classification_loss(load_model(), batch).shape
        torch.Size([])
    """
    clip = cast(ImageTextModel, model)
    images = clip.encode_image(normalize(batch.images), normalize=True)
    texts = clip.encode_text(batch.tokens, normalize=True)
    logits = clip.logit_scale.exp() * images @ texts.T
    return F.cross_entropy(adjusted_logits(model, logits, images, batch.tokens), batch.labels)


def accuracy(model: nn.Module, task: Task, split: SplitName = "test", *, batch_size: int = 256) -> float:
    """Percentage of a split's images whose nearest class text is their own: the share of [`correct`][].

    Raises:
        ValueError: unknown split, empty split, or batch size below 1.
    """
    right = correct(model, task, split, batch_size=batch_size)
    return 100.0 * int(right.sum()) / len(right)


@torch.no_grad()
def correct(model: nn.Module, task: Task, split: SplitName = "test", *, batch_size: int = 256) -> Tensor:
    """Which of a split's images are nearest to their own class text, in evaluation mode: bool [n], on the CPU.

    Where a method has put a head on the model, the class with the largest logit counts. The head is told the prompts of
    the task's classes and nothing else: as in MTIL, which classes are to choose from is known, and no more.

    The model's training mode is restored, also after an error. Data moves to the device of the model's parameters.

    Raises:
        ValueError: unknown split, empty split, or batch size below 1.
    """
    part = task.split(split)
    if batch_size < 1 or len(part) == 0:
        raise ValueError(
            f"accuracy: split must hold images and batch_size be at least 1, got {len(part)} and {batch_size}."
        )
    clip = cast(ImageTextModel, model)
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        tokens = task.tokens.to(device)
        texts = clip.encode_text(tokens, normalize=True)
        right = []
        for start in range(0, len(part), batch_size):
            images = clip.encode_image(normalize(part.images[start : start + batch_size].to(device)), normalize=True)
            scores = images @ texts.T
            if class_head(model) is not None:  # which the temperature is for: it changes no order among the texts
                scores = adjusted_logits(model, clip.logit_scale.exp() * scores, images, tokens)
            right.append(scores.argmax(1).cpu() == part.labels[start : start + batch_size].cpu())
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.cat(right)


class ClassificationWorkload(TaskSequence[Task]):
    """A sequence of [`Task`][] and the model that learns it.

    ``make_model`` returns a fresh model; the images of all tasks are kept on ``device``.
    """

    def __init__(
        self, tasks: Sequence[Task], witness: Task | None, make_model: Callable[[], nn.Module], *, device: str = "cpu"
    ) -> None:
        super().__init__(tasks, witness, device=device)
        self._make_model = make_model

    def model(self) -> nn.Module:
        """A fresh copy of the pretrained model."""
        return self._make_model()

    def batches(self, task: int, batch_size: int, seed: int) -> Batches:
        """One shuffled pass over the training split."""
        chosen = self.task(task)
        return loader(chosen.train, chosen.tokens, batch_size, seed=seed)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy over the classes' texts."""
        return classification_loss(model, batch)

    def accuracy(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> float:
        """Fraction of images whose nearest class text is their own."""
        return accuracy(model, self.task(task), cast(SplitName, split), batch_size=batch_size) / 100

    def correct(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> Tensor:
        """Which images are nearest to their own class text."""
        return correct(model, self.task(task), cast(SplitName, split), batch_size=batch_size)
