"""Logits over classes that are given by prompts, and the module by which a method has a say in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

__all__ = [
    "ClassHead",
    "ImageTextModel",
    "adjusted_logits",
    "class_head",
    "is_image_text_model",
    "observed",
    "put_class_head",
    "require_no_head",
]

_NAME = "keeplora_head"


class ImageTextModel(Protocol):
    """What a task asks of a model: both towers of a CLIP and its temperature (as `open_clip.model.CLIP` has them)."""

    logit_scale: Tensor

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Features ``[n, d]`` of images."""
        ...

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Features ``[n, d]`` of tokenised texts ``[n, context]``."""
        ...


class ClassHead(nn.Module):
    """What a method knows of classes beyond the model's two towers. A part of the model, as ``model.keeplora_head``.

    Who is asked which classes are scored is the caller, by their prompts; no task has to be named.
    """

    def __init__(self) -> None:
        super().__init__()
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        """``observer(images, tokens)`` is called with what every logits are made of."""

    def forward(self, logits: Tensor, images: Tensor, tokens: Tensor) -> Tensor:
        """Logits ``[n, classes]`` of normalised image features ``[n, d]``, where ``tokens [classes, context]`` are the
        prompts of the scored classes."""
        if self.observer is not None:
            self.observer(images, tokens)
        return self.adjust(logits, images, tokens)

    def adjust(self, logits: Tensor, images: Tensor, tokens: Tensor) -> Tensor:
        """The logits that count. They stay as they are for classes the method does not know."""
        return logits


def is_image_text_model(model: nn.Module) -> bool:
    """Whether ``model`` has both towers and a temperature: an [`ImageTextModel`][]."""
    return all(hasattr(model, name) for name in ("encode_image", "encode_text", "logit_scale"))


def class_head(model: nn.Module) -> ClassHead | None:
    """The head that was put on ``model``, or None."""
    head = getattr(model, _NAME, None)
    return head if isinstance(head, ClassHead) else None


def require_no_head(model: nn.Module) -> None:
    """Refuse a model that another method has put its head on already; RuntimeError."""
    if hasattr(model, _NAME):
        raise RuntimeError(f"put_class_head: model must not have a {_NAME} yet, got one. Use a fresh model.")


def put_class_head(model: nn.Module, head: ClassHead | None) -> None:
    """Make ``head`` a part of ``model``, or take it off (None).

    Raises:
        RuntimeError: there is one already.
    """
    if head is not None:
        require_no_head(model)
    if head is None:
        delattr(model, _NAME)
    else:
        model.add_module(_NAME, head.train(model.training))


def adjusted_logits(model: nn.Module, logits: Tensor, images: Tensor, tokens: Tensor) -> Tensor:
    """``logits [n, classes]``, which are ``exp(logit_scale) ⟨image, text⟩``, and what the model's head makes of them.

    For losses and accuracies of one's own: without this line methods that keep classifiers, or tell tasks apart, do not
    take part.

    Args:
        images: ``[n, d]``, the normalised image features.
        tokens: ``[classes, context]``, the scored classes' prompts.

    Examples:
        >>> import torch
        >>> adjusted_logits(nn.Identity(), torch.ones(1, 2), torch.ones(1, 4), torch.zeros(2, 3, dtype=torch.int64))
        tensor([[1., 1.]])
    """
    head = class_head(model)
    return logits if head is None else head(logits, images, tokens)


@contextmanager
def observed(head: ClassHead, observer: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Show ``observer`` the image features and prompts of all logits that are formed in between."""
    head.observer = observer
    try:
        yield
    finally:
        head.observer = None
