"""A user's own image tasks as a workload: a model that compares images with the texts of classes learns them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keeplora._messages import listed
from keeplora.families.class_head import adjusted_logits
from keeplora.methods.settings import ConfigError
from keeplora.tasks.classification import Batch
from keeplora.tasks.field import image_benchmark
from keeplora.tasks.own.comparing import ComparingModel, open_comparing_model
from keeplora.tasks.own.config import OwnTasks
from keeplora.tasks.own.decoded import Decoded, Pixels, cache_folder, decode_all
from keeplora.tasks.own.faults import Faults
from keeplora.tasks.own.images import ImageItem, ImageSet, read_all
from keeplora.tasks.own.pixels import check_image, rgb
from keeplora.tasks.own.splits import split_off, thinned
from keeplora.tasks.workload import ModelOrigin

__all__ = ["ImageTask", "ImageWorkload"]

_TEXTS_AT_A_TIME = 256
_OF_THE_FIELD = {"grey": "convert", "alpha": "convert", "animated": "convert", "depth": "skip", "overlap": "allow"}
"""What the field's own code does with its data, without a word."""


@dataclass(frozen=True)
class ImageTask:
    """A task that is read: classes and their texts, images, and which of them are for what."""

    name: str
    classes: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: Tensor
    images: Decoded
    labels: Tensor
    places: dict[str, list[int]]
    spoken: Tensor
    """Tokens that tests use, `[templates, classes, n]`; training uses `tokens`, of the one template."""
    contents: str
    """Hash of the images' names and bytes, the labels and the texts."""


@dataclass(frozen=True)
class _Decoder:
    """The model's preprocessing, of images as their files are."""

    model: ComparingModel

    @property
    def settings(self) -> str:
        return self.model.preprocessing

    def check(self, item: ImageItem, raw: bytes) -> list[tuple[str, str]]:
        return check_image(raw)

    def pixels(self, item: ImageItem, raw: bytes) -> Pixels:
        return self.model.pixels(rgb(raw)).numpy()


@dataclass(frozen=True)
class _Pass:
    """One pass over the training images, in an order that `seed` decides."""

    task: ImageTask
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return -(-len(self.task.places["train"]) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        places = torch.tensor(self.task.places["train"])
        order = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(self.seed))]
        parts = [part.tolist() for part in torch.split(order, self.batch_size)]
        for part, images in zip(parts, self.task.images.batches(parts), strict=True):
            yield Batch(images, self.task.labels[part], self.task.tokens)


class ImageWorkload:
    """A sequence of image tasks, and the open_clip or transformers model that learns them.

    The loss is the cross-entropy over the texts of the task's classes; right is an image whose nearest text is its own.

    Raises:
        ConfigError: something is wrong with the model or the data that the settings do not allow; all of it is told at
            once, before anything is trained.
    """

    def __init__(self, own: OwnTasks, device: str = "cpu") -> None:
        self._device = device
        faults = Faults(own.data, _OF_THE_FIELD if own.benchmark else {})
        self._kept = 0
        self._folder = cache_folder(own.data.cache and str(own.path(own.data.cache)))
        sets = read_all(own, faults)
        self._model = open_comparing_model(own)  # after the data is found: it takes seconds, or a download
        _check_overlap(sets, faults)
        read = [self._read(found, own, faults) for found in sets]
        faults.refuse()
        self._tasks = [made for made in read if made is not None]
        for task in [] if own.benchmark else self._tasks:  # of the field's, sizes are compared with the published
            _check_sizes(task)
        self._witness = self._tasks.pop() if own.witness is not None else None
        self._one_space = bool(own.benchmark) and image_benchmark(own.benchmark).one_label_space
        self._notes = [*faults.notes(), *(note for found in sets for note in found.notes), *self._told(own)]

    def _read(self, found: ImageSet, own: OwnTasks, faults: Faults) -> ImageTask | None:
        data = own.data
        room = max(0, int(1e9 * data.cache_gb) - self._kept)
        images = decode_all(
            found.items, _Decoder(self._model), folder=self._folder, room=room, readers=data.readers, title=found.name
        )
        report = images.report
        self._kept += report.kept
        out: set[int] = set()
        for place, kinds in report.wrong.items():
            for kind, why in kinds:
                if not faults.add(kind, found.name, found.items[place].name, why):
                    out.add(place)
        names = [name.replace("_", " ") for name in found.classes]
        texts = tuple(found.template.replace("{}", name) for name in names)
        templates = found.templates if data.test_texts == "mean" and found.templates else (found.template,)
        spoken = [[template.replace("{}", name) for name in names] for template in templates]
        for text in self._model.too_long(sorted({*texts, *(text for row in spoken for text in row)})):
            faults.add("long_text", found.name, repr(text))
        left = {split: [place for place in places if place not in out] for split, places in found.places.items()}
        if not left["train"]:  # all are skipped or to be refused
            return None
        held = [found.classes[label] for label in found.labels]
        for split, share in (("test", data.test_fraction), ("validation", data.validation_fraction)):
            if split not in left:
                train = left["train"]
                stay, off = split_off([held[place] for place in train], share, data.split_seed)
                left["train"], left[split] = [train[i] for i in stay], [train[i] for i in off]
        for split in ("test", "validation"):
            left[split] = list(thinned(left[split], data.evaluate_at_most))
        digest = hashlib.sha256("\n".join([found.name, *found.classes, *texts, *map(str, spoken)]).encode())
        for split, places in left.items():
            for place in places:
                item = found.items[place]
                digest.update(f"{split}\n{item.name}\n{report.hashes[place]}\n{held[place]}\n".encode())
        return ImageTask(
            found.name, found.classes, texts, self._model.tokens(texts), images, torch.tensor(found.labels), left,
            torch.stack([self._model.tokens(row) for row in spoken]), digest.hexdigest(),
        )  # fmt: skip

    def _told(self, own: OwnTasks) -> list[str]:
        lines = []
        for task in (*self._tasks, *([] if self._witness is None else [self._witness])):
            sizes = ", ".join(f"{len(task.places[split])} {split}" for split in ("train", "validation", "test"))
            lines.append(f"{task.name}: {len(task.classes)} classes, {sizes} images; {task.texts[0]!r}")
        own_splits = bool(own.benchmark) or all(
            (own.path(task.folder) / "test").is_dir() for task in own.all if task.kind == "folder"
        )
        if not own_splits:
            lines.append(
                f"where a task has no test images, {own.data.test_fraction:.0%} of each class, and of the rest "
                f"{own.data.validation_fraction:.0%} for validation, are kept from training (split_seed "
                f"{own.data.split_seed})"
            )
        if own.data.test_texts == "mean":
            lines.append("tests: the text of a class is the mean over its templates, training has the first alone")
        if self._one_space:
            lines.append("an image is right if its text is the nearest of those of all tasks' classes, learned or not")
        if own.data.evaluate_at_most:
            lines.append(
                f"a quick look: at most {own.data.evaluate_at_most} images of a split are evaluated, evenly spaced"
            )
        if self._kept:
            lines.append(f"decoded images: {self._kept / 1e9:.2g} GB in {self._folder}, which may be deleted")
        every = (*self._tasks, *([] if self._witness is None else [self._witness]))
        counts = {task.name: (task.images.report.again, len(task.images)) for task in every}
        if again := [f"{name} ({count} of {whole})" for name, (count, whole) in counts.items() if count]:
            lines.append(f"decoded again in every pass, beyond cache_gb = {own.data.cache_gb:g}: {listed(again)}")
        return lines

    @property
    def tasks(self) -> Sequence[str]:
        """Names in learning order."""
        return [task.name for task in self._tasks]

    @property
    def witness(self) -> str | None:
        """Name of the task that is only evaluated."""
        return None if self._witness is None else self._witness.name

    def task(self, index: int | None) -> ImageTask:
        """The task with this place in the order; None means the witness."""
        chosen = self._witness if index is None else self._tasks[index]
        assert chosen is not None
        return chosen

    def evaluated(self, task: int, split: str = "test") -> int:
        """How many images of a task's split are evaluated."""
        return len(self.task(task).places[split])

    def notes(self) -> list[str]:
        """What a user should know of the data before it is learned: counts, splits, what was left out or changed."""
        return list(self._notes)

    def fingerprint(self) -> str:
        """Hash of the images' names and bytes, labels, texts and splits, and of the pretrained weights."""
        digest = hashlib.sha256()
        for task in (*self._tasks, *([] if self._witness is None else [self._witness])):
            digest.update(task.contents.encode())
        digest.update(self._model.preprocessing.encode())
        for name, weight in self._model.pretrained.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    @property
    def origin(self) -> ModelOrigin:
        """Where the pretrained model comes from."""
        return self._model.origin

    def contents(self, task: int | None, split: str) -> str:
        """Hash of what evaluating a split depends on besides the model: images, classes, all texts to choose from."""
        chosen = self.task(task)
        asked, offset = self._choices(chosen)
        told = [self._model.preprocessing, split, str(offset), *(one.contents for one in asked), chosen.contents]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def save_model(self, model: nn.Module, folder: Path) -> str:
        """Write a merged model as its library does; returns the line of Python that loads it."""
        return self._model.save(model, folder)

    def model(self) -> nn.Module:
        """A fresh copy of the pretrained model."""
        return self._model.fresh()

    def batches(self, task: int, batch_size: int, seed: int) -> _Pass:
        """One shuffled pass over the training images."""
        return _Pass(self.task(task), batch_size, seed)

    def evenly(self, task: int, batch_size: int, seed: int, share: float) -> _Pass:
        """A pass over a share of the training images, evenly spaced in the order of classes and names."""
        chosen = self.task(task)
        train = chosen.places["train"]
        some = list(thinned(train, max(1, round(share * len(train)))))
        return _Pass(replace(chosen, places={**chosen.places, "train": some}), batch_size, seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy over the classes' texts."""
        weight = next(model.parameters())
        batch = batch.to(weight.device)
        images = self._model.image_features(model, self._model.normalised(batch.images, weight.dtype))
        texts = self._model.text_features(model, batch.tokens)
        return F.cross_entropy(self._logits(model, images, texts, batch.tokens), batch.labels)

    def _logits(self, model: nn.Module, images: Tensor, texts: Tensor, tokens: Tensor) -> Tensor:
        scale: Tensor = model.logit_scale  # type: ignore[assignment]
        return adjusted_logits(model, scale.exp() * images @ texts.T, images, tokens)

    def accuracy(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> float:
        """Fraction of images whose nearest text is their own."""
        right = self.correct(model, task, split, batch_size)
        return int(right.sum()) / len(right)

    @torch.no_grad()
    def correct(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> Tensor:
        """Which images are nearest to their own text: bool `[n]`, in the order of the split.

        In evaluation mode; that of before is put back.
        """
        chosen = self.task(task)
        places = chosen.places[split]
        if not places:
            raise ConfigError(f"evaluate: {split} of task {chosen.name!r} must hold images, got none")
        modes = {module: module.training for module in model.modules()}
        weight = next(model.parameters())
        asked, offset = self._choices(chosen)
        tokens = torch.cat([task.tokens for task in asked]).to(weight.device)
        parts = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
        model.eval()
        try:
            texts = torch.cat([self._class_features(model, task, weight.device) for task in asked])
            right = []
            for part, pixels in zip(parts, chosen.images.batches(parts), strict=True):
                x = self._model.normalised(pixels.to(weight.device), weight.dtype)
                scores = self._logits(model, self._model.image_features(model, x), texts, tokens)
                right.append(scores.argmax(1).cpu() == chosen.labels[part] + offset)
        finally:
            for module, training in modes.items():
                module.training = training
        return torch.cat(right)

    def _class_features(self, model: nn.Module, task: ImageTask, device: torch.device) -> Tensor:
        """`[classes, d]`: of each class the mean over its templates of features of length 1, itself of length 1."""
        texts = task.spoken.flatten(0, 1).to(device)
        features = torch.cat([self._model.text_features(model, part) for part in torch.split(texts, _TEXTS_AT_A_TIME)])
        if len(task.spoken) == 1:
            return features
        return F.normalize(features.view(*task.spoken.shape[:2], -1).mean(0), dim=-1)

    def _choices(self, chosen: ImageTask) -> tuple[list[ImageTask], int]:
        """The tasks whose texts are to choose from, and where this one's begin among them."""
        if not self._one_space:
            return [chosen], 0
        place = next(place for place, task in enumerate(self._tasks) if task is chosen)
        offset = sum(len(task.classes) for task in self._tasks[:place])
        return self._tasks, offset


def _check_overlap(sets: Sequence[ImageSet], faults: Faults) -> None:
    first: dict[str, str] = {}
    for found in sets:
        for name in found.classes:
            key = name.replace("_", " ").casefold()
            if first.get(key) == found.name:
                raise ConfigError(
                    f"open_workload: classes of a task must have texts of their own, got two that read {key!r} in task "
                    f"{found.name!r}. Rename one"
                )
            if key in first:
                faults.add("overlap", found.name, repr(name), f"in {first[key]}, too")
            else:
                first[key] = found.name


def _check_sizes(task: ImageTask) -> None:
    """Every class is trained, and something is tested."""
    trained = set(task.labels[task.places["train"]].tolist())
    if untrained := [name for number, name in enumerate(task.classes) if number not in trained]:
        raise ConfigError(
            f"open_workload: every class of task {task.name!r} must have a training image, got none of "
            f"{listed(untrained)}. Leave them out or add images"
        )
    if not task.places["test"]:
        raise ConfigError(
            f"open_workload: task {task.name!r} must have test images, got none: every class has one image alone. "
            "Add images, or a folder test"
        )
