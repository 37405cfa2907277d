"""KeepLoRA++cls: KeepLoRA++ with a cosine classifier on image features for the classes of each task."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from keeplora.distributed import processes
from keeplora.families.class_head import is_image_text_model, observed, put_class_head
from keeplora.lora import Target
from keeplora.methods.keeplora.certificate import RetentionCertificate
from keeplora.methods.keeplora.config import KeepLoraConfig
from keeplora.methods.keeplora.method import KeepLora
from keeplora.methods.method import LossFn, Method, require_loss_fn
from keeplora.methods.settings import ConfigError, check_range
from keeplora.methods.state import State, StateError
from keeplora.methods.verify import check_state

from .classifiers import ClassMeans, CosineClassifiers

__all__ = ["KeepLoraCls", "KeepLoraClsConfig"]


@dataclass(frozen=True)
class KeepLoraClsConfig(KeepLoraConfig):
    """As :class:`~keeplora.KeepLoraConfig`, and the classifiers' temperature.

    Args:
        classifier_scale: s in ``s ⟨f, w/‖w‖⟩``; 30 as in the public code, where the text logits have CLIP's 100.

    Example:
        >>> KeepLoraClsConfig(r=8).classifier_scale
        30.0
    """

    classifier_scale: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "classifier_scale", "(0, inf)")
        if self.directions != "gradient":
            raise ConfigError(
                f"KeepLoraClsConfig: directions must be 'gradient', got {self.directions!r}: the classifiers start at "
                "class means, which the gradient pass collects. Use keeplora++ for random directions."
            )


class KeepLoraCls(KeepLora):
    r"""KeepLoRA++ and, for the classes of each task, a classifier on image features that adds to their logits.

    .. math:: z_c = e^{\tau} \langle f, t_c \rangle + s\, \langle f, w_c / \lVert w_c \rVert \rangle, \qquad
              w_c \leftarrow \overline{f}_c / \lVert \overline{f}_c \rVert \text{ at first}

    for the normalised image feature f and text feature :math:`t_c`; :math:`\overline{f}_c` is the mean of f over the
    class's images before the task. The rows are trained with the adapters and frozen afterwards.

    A classifier takes part where the classes that are scored, told by their prompts, all belong to learned tasks. As in
    MTIL one knows which classes are to choose from, and nothing else: no task identity is given to the model.

    Args:
        model: An image–text model: ``encode_image``, ``encode_text``, ``logit_scale``. It gets a module
            ``keeplora_head``.
        config: Settings of KeepLoRA++ and ``classifier_scale``.

    Raises:
        TypeError: the model has no image features (at once); ``loss_fn`` does not ask the head, or batches have no
            labels (in ``before_task``, before anything has changed).

    Source: the "+" of KeepLoRA, arXiv:2601.19659. From its public code (MaolinLuo/KeepLoRA): the sum of both logits, in
    training too; s = 30; start at class means; a classifier is found by the class names that are scored. Ours: found by
    prompts, so that subsets and unions of learned tasks work; a class without an image in the pass starts at its text.
    """

    name: ClassVar[str] = "keeplora++cls"
    merges = False
    config_type: ClassVar[type[KeepLoraConfig]] = KeepLoraClsConfig

    def __init__(
        self,
        model: nn.Module,
        config: KeepLoraClsConfig | None = None,
        *,
        targets: Sequence[Target] | None = None,
        progress: bool | None = None,
    ):
        if not is_image_text_model(model):
            raise TypeError(
                "KeepLoraCls: model must have image features (encode_image, encode_text, logit_scale, as open_clip's "
                f"models do), got {type(model).__name__}. Use keeplora++ for other models."
            )
        config = config or KeepLoraClsConfig()
        self.head = CosineClassifiers(config.classifier_scale)
        super().__init__(model, config, targets=targets, progress=progress)
        put_class_head(model, self.head)

    def before_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        """As :meth:`KeepLora.before_task`; the same pass gives the classifier's start.

        Raises:
            RuntimeError: there are several processes; each would start at the means of its own images.

        Warns:
            UserWarning: the pass had no image of a class; its classifier starts at the class's text.
        """
        if processes().size > 1:
            raise RuntimeError(
                f"KeepLoraCls: class means are taken in one process, got {processes().size}. "
                "Train in one process, or use keeplora++."
            )
        require_loss_fn(loss_fn)
        means = ClassMeans()
        with observed(self.head, means.observe):
            super().before_task(loader, means.of_loss(loss_fn))
        self._loss_fn = loss_fn
        start, empty = means.start()
        self.head.add(start, means.tokens)
        if empty:
            warnings.warn(
                f"KeepLoraCls: {empty} of {len(start)} classes had no image in the pass before the task and start at "
                "their texts. Let the pass see more of the data.",
                UserWarning,
                stacklevel=2,
            )

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters and the task's classifier ``[classes, d]``."""
        return [*super().trainable_parameters(), self.head.classifiers()[-1].weight]

    @torch.no_grad()
    def after_task(self, loader: Iterable[Any], loss_fn: LossFn | None = None) -> RetentionCertificate:
        """As :meth:`KeepLora.after_task`; the task's classifier is frozen.

        Raises:
            ValueError: what was trained is not finite.
        """
        self._require_task("after_task")
        weight = self.head.classifiers()[-1].weight
        if not torch.isfinite(weight).all():
            raise ValueError(
                "after_task: the trained classifier must be finite, got NaN or Inf. "
                "Go back to the last saved state and lower the learning rate."
            )
        result = super().after_task(loader, loss_fn)
        weight.requires_grad_(False)
        return result

    def merge(self) -> nn.Module:
        """Refused: the classifiers are no part of the model's own weights."""
        return Method.merge(self)

    def state(self) -> State:
        """As :meth:`KeepLora.state`, with the classifiers and their prompts."""
        state = super().state()
        for i, task in enumerate(self.head.classifiers()):
            state.tensors[f"classifier.{i}.weight"] = task.weight.detach().to("cpu", copy=True)
            state.tensors[f"classifier.{i}.tokens"] = task.tokens.to("cpu", copy=True)
        state.meta["classifiers"] = len(self.head.tasks)
        return state

    def load_state(self, state: State) -> None:
        """Continue from ``state``. Everything is checked before anything changes.

        Raises:
            StateError: as :meth:`KeepLora.load_state`, or a classifier is missing.
        """
        check_state(state, self.name, self.model, self.slots)
        count = state.meta["tasks_learned"] + bool(state.meta["training_task"])
        if state.meta.get("classifiers") != count:
            raise StateError(
                f"load_state: state must hold one classifier for each of {count} tasks, got "
                f"{state.meta.get('classifiers')!r}"
            )
        found = []
        for i in range(count):
            weight, tokens = (state.tensors.get(f"classifier.{i}.{name}") for name in ("weight", "tokens"))
            if weight is None or tokens is None or weight.dim() != 2 or tokens.dim() != 2 or len(weight) != len(tokens):
                raise StateError(f"load_state: classifier {i} must be a matrix with one row for each of its prompts")
            found.append((weight, tokens))
        device = self.slots[0].weight.device
        self.head.tasks = nn.ModuleList()
        for weight, tokens in found:
            self.head.add(weight.to(device), tokens.to(device)).weight.requires_grad_(False)
        super().load_state(state)
