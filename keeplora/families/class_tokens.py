"""Which token stands for a whole sample in the layers of each tower: the class token, or what is pooled instead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from keeplora.lora import LoraSlot

from . import open_clip, transformers

__all__ = ["ClassTokens", "class_tokens", "class_tokens_of"]

Place = Literal["first", "last", "end", "mean"]
"""The first or last token, the one with the end-of-text id, or the mean of all where a tower pools no single token."""


class ClassTokens:
    """The token of every sample that its tower reads the result from, in the inputs of the tower's layers.

    Args:
        places: By tower; others are read at their first token.
        end: The id of the end of a text; None if that is each text's largest id.
    """

    def __init__(self, places: Mapping[str, Place], end: int | None = None):
        self.places: dict[str, Place] = dict(places)
        self.end = end
        self.ids: Tensor | None = None

    def remember(self, _module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> None:
        """The texts that are on their way: a hook for the token embedding."""
        self.ids = args[0]

    def of(self, tower: str, x: Tensor) -> Tensor:
        """``[samples, in]`` of a layer's input ``[samples, tokens, in]``; rows of ``[samples, in]`` are samples."""
        if x.dim() < 3:
            return x.reshape(-1, x.shape[-1])
        x = x.flatten(1, -2)
        place = self.places.get(tower, "first")
        if place == "mean":
            return x.mean(1)
        if place == "end":
            return x[torch.arange(len(x), device=x.device), self._ends(x)]
        return x[:, 0 if place == "first" else -1]

    def mask(self, slot: LoraSlot, x: Tensor) -> Tensor | None:
        """The same tokens as a mask for [`feature_statistics`][keeplora.statistics.feature_statistics].

        None where all count.
        """
        place = self.places.get(slot.target.tower, "first")
        if x.dim() < 3 or place == "mean":
            return None
        keep = torch.zeros(x.shape[0], math.prod(x.shape[1:-1]), dtype=torch.bool, device=x.device)
        if place == "end":
            keep[torch.arange(len(x), device=x.device), self._ends(x.flatten(1, -2))] = True
        else:
            keep[:, 0 if place == "first" else -1] = True
        return keep.view(x.shape[:-1])

    def _ends(self, x: Tensor) -> Tensor:
        if self.ids is None or self.ids.shape != x.shape[:2]:
            got = None if self.ids is None else list(self.ids.shape)
            raise RuntimeError(
                f"class_tokens: the text tower must run on the tokens it embedded last, got ids {got} for inputs "
                f"{list(x.shape)}. Run encode_text as a whole."
            )
        if self.end is None:
            return self.ids.argmax(-1)
        return (self.ids == self.end).int().argmax(-1)


def class_tokens(model: nn.Module) -> tuple[ClassTokens, list[RemovableHandle]]:
    """Where the class tokens of ``model`` are, and the handles of the hooks that follow its texts.

    Of open_clip's models: the class token of an image tower, or the mean of its tokens where it pools otherwise; the
    token a text tower pools, which is the end of the text, since it is the only one that has seen all others. Of
    transformers' encoders: the class token, or the mean of the tokens of images without one. Of models that are not
    known: the first token of each sample.

    Raises:
        ValueError: a model of transformers with a language model or a text tower beside its images, which reads a text
            at another token than its first.
        ValueError: an attention layer takes ``[tokens, samples, width]``: samples could not be told from tokens.

    Examples:
        >>> tokens, _ = class_tokens(nn.Sequential(nn.Linear(2, 2)))
        >>> tokens.of("model", torch.arange(8.0).view(2, 2, 2))
        tensor([[0., 1.],
                [4., 5.]])
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise ValueError(
                f"class_tokens: attention must take [samples, tokens, width], got batch_first=False at {path!r}. "
                "Make the model with batch_first=True."
            )
    clip = next((module for module in model.modules() if open_clip.owns(module)), None)
    if clip is None:
        return ClassTokens({tower: p for known in _encoders(model) for tower, p in _encoder_places(known).items()}), []
    text = getattr(clip, "text", clip)
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    if getattr(text, "cls_emb", None) is not None:  # CoCa appends one, and pools it whatever it is told
        pool = "last"
    pooled: dict[Any, Place] = {"argmax": "end", "eos": "end", "last": "last", "first": "first"}
    places: dict[str, Place] = {
        "vision": "first" if _has_class_token(clip) else "mean",
        "text": pooled.get(pool, "mean"),
    }
    end = getattr(text, "text_eos_id", getattr(text, "eos_id", None)) if pool == "eos" else None
    tokens = ClassTokens(places, end)
    embedding = getattr(text, "token_embedding", None)
    if places["text"] != "end" or not isinstance(embedding, nn.Module):
        return tokens, []
    return tokens, [embedding.register_forward_hook(tokens.remember)]


@contextmanager
def class_tokens_of(model: nn.Module) -> Iterator[tuple[ClassTokens, list[RemovableHandle]]]:
    """[`class_tokens`][], whose hooks stay if the block gets through; an error in it takes them away."""
    tokens, hooks = class_tokens(model)
    try:
        yield tokens, hooks
    except BaseException:
        for hook in hooks:
            hook.remove()
        raise


def _has_class_token(clip: nn.Module) -> bool:
    visual = getattr(clip, "visual", None)
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        return getattr(trunk, "global_pool", None) == "token"
    return getattr(visual, "pool_type", None) == "tok"


def _encoders(model: nn.Module) -> list[nn.Module]:
    """The outermost models of transformers; an image encoder may stand beside a text encoder."""
    if transformers.owns(model):
        return [model]
    return [known for child in model.children() for known in _encoders(child)]


def _encoder_places(model: nn.Module) -> dict[str, Place]:
    towers = {target.tower for target in transformers.find_targets(model)}
    if towers & {"language", "text"}:
        raise ValueError(
            f"class_tokens: model must be open_clip's, or an encoder whose samples have a class token, got "
            f"{type(model).__name__}, which reads a text at another token than its first. Use a method without class "
            "tokens: keeplora++, inflora, gpm."
        )
    if "vision" not in towers:
        return {}
    names = [name.rpartition(".")[2] for name, _ in model.named_parameters()]
    return {"vision": "first" if "class_embedding" in names or "cls_token" in names else "mean"}
