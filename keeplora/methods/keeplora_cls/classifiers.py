"""Cosine classifiers on image features, one for the classes of each task: a head on an image–text model."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keeplora.families.class_head import ClassHead, ImageTextModel
from keeplora.methods.method import LossFn

__all__ = ["ClassMeans", "CosineClassifiers"]


class CosineClassifier(nn.Module):
    """One task's classifier: weight ``[classes, d]``, and the prompts ``[classes, context]`` its rows belong to."""

    tokens: Tensor

    def __init__(self, weight: Tensor, tokens: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.register_buffer("tokens", tokens.detach().clone())


class CosineClassifiers(ClassHead):
    r"""Adds to the logits of every scored class what the classifiers say of it.

    $$ z_c = e^{\tau} \langle f, t_c \rangle + s\, \langle f, w_c / \lVert w_c \rVert \rangle $$

    for a normalised image feature f, the text feature $t_c$ and the classifier's row $w_c$. Rows are found
    by the prompts of the scored classes. Where one of them has no row, nothing is added to any: with and without a
    classifier classes cannot be compared.

    Args:
        scale: s.
    """

    def __init__(self, scale: float):
        super().__init__()
        self.scale = float(scale)
        self.tasks = nn.ModuleList()

    def add(self, weight: Tensor, tokens: Tensor) -> CosineClassifier:
        """One more task's classifier. Of two with the same prompts the later one counts."""
        classifier = CosineClassifier(weight, tokens).train(self.training)
        self.tasks.append(classifier)
        return classifier

    def classifiers(self) -> list[CosineClassifier]:
        """Those of the tasks that have one, in order."""
        return [task for task in self.tasks if isinstance(task, CosineClassifier)]

    def rows(self, tokens: Tensor) -> Tensor | None:
        """The rows ``[classes, d]`` of the classes with these prompts; None where one has none."""
        tasks = self.classifiers()
        for task in reversed(tasks):
            if torch.equal(task.tokens, tokens):
                return task.weight
        places = {
            tuple(prompt): (i, c) for i, task in enumerate(tasks) for c, prompt in enumerate(task.tokens.tolist())
        }
        wanted = [places.get(tuple(prompt)) for prompt in tokens.tolist()]
        if not wanted or any(place is None for place in wanted):
            return None
        return torch.stack([tasks[i].weight[c] for i, c in (place for place in wanted if place is not None)])

    def adjust(self, logits: Tensor, images: Tensor, tokens: Tensor) -> Tensor:
        rows = self.rows(tokens)
        if rows is None:
            return logits
        return logits + self.scale * F.linear(F.normalize(images, dim=-1), F.normalize(rows, dim=-1).to(images.dtype))


class ClassMeans:
    """Normalised mean of the normalised image features of each class, gathered while a loss runs over the batches."""

    def __init__(self) -> None:
        self.tokens = torch.empty(0)
        self.texts = torch.empty(0)
        self.sums: Tensor | None = None
        self.counts = torch.empty(0)
        self.seen: tuple[Tensor, Tensor] | None = None
        self.batch: Any = None

    def observe(self, images: Tensor, tokens: Tensor) -> None:
        self.seen = (images.detach(), tokens)

    def of_loss(self, loss_fn: LossFn) -> LossFn:
        """``loss_fn``, which adds its batches to the means. A batch that comes twice in a row counts once."""

        def counted(model: nn.Module, batch: Any) -> Tensor:
            self.seen = None
            loss = loss_fn(model, batch)
            if batch is not self.batch:
                self.add(model, batch)
                self.batch = batch
            return loss

        return counted

    @torch.no_grad()
    def add(self, model: nn.Module, batch: Any) -> None:
        if self.seen is None:
            raise TypeError(
                "before_task: loss_fn must pass its logits through keeplora.families.class_head.adjusted_logits, "
                "as keeplora.tasks.classification.classification_loss does, got one that does not: the classifiers "
                "would take no part."
            )
        images, tokens = self.seen
        labels = getattr(batch, "labels", None)
        if not isinstance(labels, Tensor) or labels.shape != images.shape[:1] or labels.is_floating_point():
            got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(
                f"before_task: batches must have labels, integers [{len(images)}], got {got}. "
                "Use keeplora.tasks.classification.Batch, or a named tuple with this field."
            )
        if self.sums is None:
            self.tokens = tokens.detach().clone()
            self.texts = cast(ImageTextModel, model).encode_text(tokens, normalize=True)
            self.sums = images.new_zeros(len(tokens), images.shape[1], dtype=torch.float64)
            self.counts = images.new_zeros(len(tokens), dtype=torch.float64)
        elif not torch.equal(self.tokens, tokens):
            raise ValueError(
                f"before_task: every batch must score the classes of the task, the first one's {len(self.tokens)}, got "
                f"{len(tokens)} with other prompts in a later batch"
            )
        features = F.normalize(images.to(torch.float64), dim=-1)
        self.sums.index_add_(0, labels.to(images.device), features)
        self.counts += torch.bincount(labels, minlength=len(tokens)).to(self.counts)

    def start(self) -> tuple[Tensor, int]:
        """The classifier's first weight, float32, and the number of classes without an image: those get their text."""
        assert self.sums is not None  # or the pass would have been refused
        empty = self.counts == 0
        rows = torch.where(empty[:, None], self.texts.to(self.sums), self.sums)
        return F.normalize(rows, dim=-1).float(), int(empty.sum())
