"""KeepLoRA++cls: KeepLoRA++ with a cosine classifier on image features for the classes of each task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from keeplora._calls import public
from keeplora._messages import warn
from keeplora.distributed import processes
from keeplora.families.class_head import is_image_text_model, observed, put_class_head, require_no_head
from keeplora.lora import Target, TokenMask
from keeplora.methods.keeplora.certificate import RetentionCertificate
from keeplora.methods.keeplora.config import KeepLoraConfig
from keeplora.methods.keeplora.method import KeepLora
from keeplora.methods.method import LossFn
from keeplora.methods.reading import stored
from keeplora.methods.settings import ConfigError, check_range
from keeplora.methods.state import State, StateError

from .classifiers import ClassMeans, CosineClassifiers

__all__ = ["KeepLoraCls", "KeepLoraClsConfig"]


@dataclass(frozen=True)
class KeepLoraClsConfig(KeepLoraConfig):
    """As [`KeepLoraConfig`][], and the classifiers' temperature.

    Args:
        classifier_scale: s in ``s ⟨f, w/‖w‖⟩``; 30 as in the public code, where the text logits have CLIP's 100.

    Examples:
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

    $$
    z_c = e^{\tau} \langle f, t_c \rangle + s\, \langle f, w_c / \lVert w_c \rVert \rangle, \qquad
    w_c \leftarrow \overline{f}_c / \lVert \overline{f}_c \rVert \text{ at first}
    $$

    for the normalised image feature f and text feature $t_c$; $\overline{f}_c$ is the mean of f over the
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
    config_type: ClassVar[type] = KeepLoraClsConfig
    config: KeepLoraClsConfig

    @public
    def __init__(
        self,
        model: nn.Module,
        config: KeepLoraClsConfig | None = None,
        *,
        targets: Sequence[Target] | None = None,
        token_mask: TokenMask | None = None,
        progress: bool | None = None,
    ):
        self._require_kinds(model, config)
        if not is_image_text_model(model):
            raise TypeError(
                "KeepLoraCls: model must have image features (encode_image, encode_text, logit_scale, as open_clip's "
                f"models do), got {type(model).__name__}. Use keeplora++ for other models."
            )
        require_no_head(model)
        super().__init__(model, config, targets=targets, token_mask=token_mask, progress=progress)
        self.head = CosineClassifiers(self.config.classifier_scale)
        put_class_head(model, self.head)

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        """As [`KeepLora.open_task`][]; the same pass gives the classifier's start.

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
        means = ClassMeans()
        with observed(self.head, means.observe):
            super().open_task(loader, means.of_loss(loss_fn))
        try:
            start, empty = means.start()
            if empty:
                warn(
                    f"KeepLoraCls: {empty} of {len(start)} classes had no image in the pass before the task and start "
                    "at their texts. Let the pass see more of the data."
                )
        except BaseException:  # a warning may be an error
            super().drop_task()
            raise
        self.head.add(start, means.tokens)

    def named_trained(self) -> list[tuple[str, nn.Parameter]]:
        """The adapters' parameters and the task's classifier ``[classes, d]``."""
        return [*super().named_trained(), ("classifier", self.head.classifiers()[-1].weight)]

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> RetentionCertificate:
        """As [`KeepLora.close_task`][]; the task's classifier is frozen."""
        result = super().close_task(loader, loss_fn)
        self.head.classifiers()[-1].weight.requires_grad_(False)
        return result

    def drop_task(self) -> None:
        super().drop_task()
        del self.head.tasks[-1]

    def release(self) -> None:
        super().release()
        put_class_head(self.model, None)

    def memory_state(self) -> State:
        """As KeepLora's, with the classifiers and their prompts."""
        memory = super().memory_state()
        for i, task in enumerate(self.head.classifiers()):
            memory.tensors |= {f"classifier.{i}.weight": task.weight, f"classifier.{i}.tokens": task.tokens}
        memory.meta["classifiers"] = len(self.head.tasks)
        return memory

    def recall(self, state: State) -> Any:
        count = state.meta["tasks_learned"] + state.meta["training_task"]
        if state.meta.get("classifiers") != count:
            raise StateError(
                f"load_state: classifiers must be one for each of {count} tasks, got {state.meta.get('classifiers')!r}"
            )
        classifiers = []
        for i in range(count):
            tokens = stored(state, f"classifier.{i}.tokens", (None, None), whole=True)
            classifiers.append((stored(state, f"classifier.{i}.weight", (len(tokens), None)), tokens))
        return super().recall(state), classifiers

    def remember(self, memory: Any) -> None:
        protected, classifiers = memory
        super().remember(protected)
        device = self.slots[0].weight.device
        self.head.tasks = nn.ModuleList().train(self.head.training)
        for weight, tokens in classifiers:
            self.head.add(weight.to(device), tokens.to(device)).weight.requires_grad_(False)

    def set_weights(self, weights: Any, *, open_task: bool) -> None:
        super().set_weights(weights, open_task=open_task)
        if open_task:
            self.head.classifiers()[-1].weight.requires_grad_(True)
