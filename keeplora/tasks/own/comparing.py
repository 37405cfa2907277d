"""Models that compare images with texts: one of open_clip's, or one of transformers' with two towers."""

from __future__ import annotations

import copy
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keeplora._files import told, write_atomic
from keeplora._hub import hub_fault
from keeplora._messages import suggest
from keeplora.methods.settings import ConfigError
from keeplora.tasks._quiet import quiet_loading
from keeplora.tasks.own.config import ModelSource, OwnTasks
from keeplora.tasks.workload import ModelOrigin

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ComparingModel", "open_comparing_model"]

RANDOM = "random"


class ComparingModel(ABC):
    """A pretrained model with what turns images and texts into its inputs.

    Pixels are uint8 `[3, height, width]`: resized and cropped as the model's own preprocessing does. They are scaled,
    `(x / 255 − mean) / std`, in the forward pass, on its device.
    """

    def __init__(self, pretrained: nn.Module, mean: Sequence[float], std: Sequence[float], origin: ModelOrigin) -> None:
        self.pretrained, self.origin = pretrained.eval(), origin
        self._mean, self._std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))

    def fresh(self) -> nn.Module:
        """A copy of the pretrained model."""
        return copy.deepcopy(self.pretrained)

    @property
    @abstractmethod
    def preprocessing(self) -> str:
        """All that decides the pixels, as text."""

    @abstractmethod
    def pixels(self, image: Image.Image) -> Tensor:
        """The pixels of an RGB image: uint8 `[3, height, width]`."""

    @abstractmethod
    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 `[texts, n]`; what is longer than the context is cut."""

    @abstractmethod
    def image_features(self, model: Any, x: Tensor) -> Tensor:
        """Features `[n, d]` of normalised images, of length 1."""

    @abstractmethod
    def text_features(self, model: Any, tokens: Tensor) -> Tensor:
        """Features `[texts, d]`, of length 1."""

    @abstractmethod
    def save(self, model: Any, folder: Path) -> str:
        """Write a model of this kind as its library does; returns the line of Python that loads it."""

    def normalised(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """`(x / 255 − mean) / std`, computed in float32."""
        mean, std = (value.to(pixels.device) for value in (self._mean, self._std))
        return ((pixels.float() / 255 - mean) / std).to(dtype)

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """The texts that fill the context: another word would not change their tokens."""
        if not texts:
            return []
        same = (self.tokens(texts) == self.tokens([f"{text} word" for text in texts])).all(1)
        return [text for text, full in zip(texts, same.tolist(), strict=True) if full]


class _OpenClip(ComparingModel):
    def __init__(self, source: ModelSource) -> None:
        import open_clip  # optional, and slow to import

        name, tag = source.open_clip, source.pretrained
        known = open_clip.list_models()
        local = name.startswith(("hf-hub:", "local-dir:"))
        if not local and name not in known:
            raise ConfigError(
                f"open_workload: open_clip must name a model of open_clip, got {name!r}{suggest(name, known)}"
            )
        tags = [] if local else open_clip.list_pretrained_tags_by_model(name)
        if not local and tag != RANDOM and not os.path.isfile(tag) and tag not in tags:
            raise ConfigError(
                f"open_workload: pretrained must be a file or one of {name}'s tags, got {tag!r}{suggest(tag, tags)} "
                f"Tags: {', '.join(tags)}"
            )
        # A tag's weights want the activation they were trained with: open_clip only warns where the name has the other.
        quick = not local and bool((open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu"))
        weights = None if local or tag == RANDOM else tag
        repository, _, file = str((open_clip.get_pretrained_cfg(name, tag) or {}).get("hf_hub", "")).rpartition("/")
        files = (file,) if file else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        if weights in tags and repository and (fault := hub_fault(repository, *files)) is not None:
            raise ConfigError(
                f"open_workload: the weights of {name!r} must be on this disk or on the Hub, got {tag!r} of "
                f"{repository}: {fault}. Give pretrained a file, or open_clip a folder: local-dir:…"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of what the weights do not hold, and of all of a random model
            try:
                model = open_clip.create_model(
                    name, weights, force_quick_gelu=quick, require_pretrained=tag != RANDOM, device="cpu"
                )
            except (OSError, RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"open_workload: the model {name!r} ({tag or 'its weights'}) must load: {error}"
                ) from error
        self._config = dict(open_clip.get_model_config(name) or {}) | ({"quick_gelu": True} if quick else {})
        chosen = open_clip.get_model_preprocess_cfg(model)
        self._chosen = {
            key: chosen[key] for key in ("size", "interpolation", "resize_mode", "fill_color") if key in chosen
        }
        self._transform = open_clip.image_transform(
            chosen["size"],
            is_train=False,
            resize_mode=chosen.get("resize_mode"),
            interpolation=chosen.get("interpolation"),
            fill_color=chosen.get("fill_color", 0),
        ).transforms[:-2]  # without the last two: to a tensor in [0, 1], and normalised
        self._tokenize = open_clip.get_tokenizer(name)
        whole = name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else f"open_clip:{name}:{Path(tag).name}"
        super().__init__(
            model.to(getattr(torch, source.dtype)), chosen["mean"], chosen["std"],
            ModelOrigin("open_clip", whole.rstrip(":"), "image-classification"),
        )  # fmt: skip

    @property
    def preprocessing(self) -> str:
        return f"open_clip {sorted(self._chosen.items())}"

    def pixels(self, image: Image.Image) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor  # with open_clip

        for step in self._transform:
            image = step(image)
        made: Tensor = pil_to_tensor(image)
        return made

    def tokens(self, texts: Sequence[str]) -> Tensor:
        return self._tokenize(list(texts)).long()  # type: ignore[no-any-return]

    def image_features(self, model: Any, x: Tensor) -> Tensor:
        return model.encode_image(x, normalize=True)  # type: ignore[no-any-return]

    def text_features(self, model: Any, tokens: Tensor) -> Tensor:
        return model.encode_text(tokens, normalize=True)  # type: ignore[no-any-return]

    def save(self, model: Any, folder: Path) -> str:
        from safetensors.torch import save_model

        visual = model.visual
        preprocessing = {"mean": visual.image_mean, "std": visual.image_std, **self._chosen}
        text = json.dumps({"model_cfg": self._config, "preprocess_cfg": preprocessing}, indent=2) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(self._tokenize, "save_pretrained"):
            self._tokenize.save_pretrained(str(folder))
        write_atomic(folder / "open_clip_model.safetensors", lambda temporary: save_model(model, str(temporary)))
        write_atomic(folder / "open_clip_config.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return f'open_clip.create_model_and_transforms("local-dir:{folder.resolve()}")'


class _Transformers(ComparingModel):
    def __init__(self, source: ModelSource, name: str) -> None:
        if (fault := hub_fault(name)) is not None:
            raise ConfigError(f"open_workload: transformers must name a model, got {name!r}: {fault}")
        try:
            with quiet_loading():
                from transformers import AutoModel, AutoProcessor  # optional, and slow to import

                model = AutoModel.from_pretrained(name, dtype=getattr(torch, source.dtype))
                self._processor: Any = AutoProcessor.from_pretrained(name)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise ConfigError(f"open_workload: the model {name!r} and its processor must load: {error}") from error
        for part in ("get_image_features", "get_text_features", "logit_scale"):
            if not hasattr(model, part):
                raise ConfigError(
                    f"open_workload: a model for tasks of classes must compare images with texts, got "
                    f"{type(model).__name__} ({name}), which has no {part}. Models that answer take tasks of json"
                )
        images = self._processor.image_processor
        text = model.config.text_config
        self._context = int(text.max_position_embeddings)
        super().__init__(
            model, images.image_mean, images.image_std, ModelOrigin("transformers", name, "image-classification")
        )

    @property
    def preprocessing(self) -> str:
        plain = {key: value for key, value in self._processor.image_processor.to_dict().items() if key[0] != "_"}
        return f"transformers {sorted((key, str(value)) for key, value in plain.items())}"

    def pixels(self, image: Image.Image) -> Tensor:
        made = self._processor.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        return made["pixel_values"][0].round().clamp(0, 255).to(torch.uint8)  # type: ignore[no-any-return]

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Ids and attention mask beside each other, `[texts, 2 · context]`."""
        made = self._processor.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._context,
            return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        return torch.cat([made["input_ids"], made["attention_mask"]], 1).long()

    def image_features(self, model: Any, x: Tensor) -> Tensor:
        return _unit(model.get_image_features(pixel_values=x))

    def text_features(self, model: Any, tokens: Tensor) -> Tensor:
        ids, mask = tokens.chunk(2, 1)
        return _unit(model.get_text_features(input_ids=ids, attention_mask=mask))

    def save(self, model: Any, folder: Path) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        with told(folder):
            model.save_pretrained(folder)
            self._processor.save_pretrained(folder)
        return f'transformers.AutoModel.from_pretrained("{folder.resolve()}")'


def _unit(features: Any) -> Tensor:
    """Transformers 5 wraps them; earlier ones do not."""
    return F.normalize(getattr(features, "pooler_output", features), dim=-1)


def open_comparing_model(own: OwnTasks) -> ComparingModel:
    """The model of a settings file whose tasks are of classes.

    Raises:
        ConfigError: it is unknown, cannot be loaded, or compares nothing.
    """
    source = own.model
    if source.open_clip:
        _need("open_clip", "pip install 'keeplora[clip]'")
        return _OpenClip(_from_base(own))
    _need("transformers", "pip install transformers")
    return _Transformers(source, own.model_folder())


def _from_base(own: OwnTasks) -> ModelSource:
    """The source with paths of files that are found from the settings file on."""
    source = own.model
    if source.open_clip.startswith("local-dir:"):
        return replace(source, open_clip=f"local-dir:{own.path(source.open_clip.removeprefix('local-dir:'))}")
    weights = own.path(source.pretrained)
    return replace(source, pretrained=str(weights)) if source.pretrained and weights.is_file() else source


def _need(module: str, command: str) -> None:
    if find_spec(module) is None:
        raise ConfigError(f"open_workload: {module} must be installed for this model, got none. Run {command}")
