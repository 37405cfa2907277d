"""Questions about images or videos with their answers, from JSON: read, checked and split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keeplora._messages import listed
from keeplora._untrusted import fault
from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.broken import broken_in
from keeplora.tasks.own.config import OwnTasks, TaskSource
from keeplora.tasks.own.faults import Faults
from keeplora.tasks.own.forms import MARK, Talk, read_talk
from keeplora.tasks.own.json_rows import json_rows
from keeplora.tasks.own.videos import reads_videos

__all__ = [
    "SPLITS",
    "AnswerTask",
    "Look",
    "Sample",
    "Turn",
    "read_samples",
    "read_task",
    "sound_samples",
    "split_samples",
]

SPLITS = ("train", "validation", "test")
Look = Callable[[str, Mapping[Path, bool]], Mapping[Path, list[tuple[str, str]]]]
"""Of a task and its files (True: a video) what is wrong with each file, as kind and reason."""


@dataclass(frozen=True)
class Turn:
    """A question, in parts ``("text", words)``, ``("image", "")`` and ``("video", "")``, and its answer."""

    parts: tuple[tuple[str, str], ...]
    answer: str


@dataclass(frozen=True)
class Sample:
    """A conversation; the images and videos stand in the order in which its parts name them."""

    place: str
    """Where it is: the file's name and the sample's number in it."""
    turns: tuple[Turn, ...]
    images: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()
    told: str = ""
    """Its image's or video's path as the annotation has it: some scoring rules go by it."""
    references: tuple[str, ...] = ()
    """Right captions, where it is one of a benchmark of captions."""

    @property
    def question(self) -> str:
        """The words of the last question."""
        return "\n".join(text for kind, text in self.turns[-1].parts if kind == "text")

    @property
    def answer(self) -> str:
        """The last one: what is scored."""
        return self.turns[-1].answer

    @property
    def files(self) -> tuple[Path, ...]:
        """Its images and videos."""
        return self.images + self.videos


@dataclass(frozen=True)
class AnswerTask:
    """A task's samples, whole and without fault but for those that are refused later."""

    name: str
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]

    @property
    def splits(self) -> Iterator[tuple[str, tuple[Sample, ...]]]:
        """Name and samples of each split."""
        return ((split, getattr(self, split)) for split in SPLITS)


def read_task(source: TaskSource, own: OwnTasks, faults: Faults, look: Look) -> AnswerTask:
    """The samples of a task, with every image and video looked at; what is wrong with them goes to ``faults``.

    Where the task has no file for tests, the share ``data.test_fraction`` of its samples is kept for them, drawn by
    ``data.split_seed``; the same goes for validation, out of the training samples. Samples that share an image or a
    video stay together, so that no image is trained on and tested.

    Raises:
        ConfigError: a file is not there, is no JSON, or holds something else than conversations.
    """
    read = {}
    for split, name in (("train", source.json), ("validation", source.validation), ("test", source.test)):
        if name:
            path = own.path(name)
            folder = own.path(source.images) if source.images else path.parent
            read[split] = sound_samples(read_samples(path, folder), source.name, faults)
    every = [sample for samples in read.values() for sample in samples]
    with_video = next((sample for sample in every if sample.videos), None)
    if with_video is not None and not reads_videos():
        raise ConfigError(
            f"load_workload: videos must be readable, got {with_video.videos[0]} in {with_video.place} of task "
            f"{source.name!r} and no PyAV. Run pip install 'keeplora[vlm]'"
        )
    looked = look(source.name, dict(file for sample in every for file in _files(sample)))
    stays = {path: [faults.add(kind, source.name, path, why) for kind, why in wrong] for path, wrong in looked.items()}
    sound = {path: all(each) for path, each in stays.items()}
    kept = {split: [s for s in samples if all(sound[path] for path in s.files)] for split, samples in read.items()}
    train = kept["train"]
    if "test" not in kept:
        kept["test"], train = split_samples(train, own.data.test_fraction, own.data.split_seed)
    if "validation" not in kept:
        kept["validation"], train = split_samples(train, own.data.validation_fraction, own.data.split_seed + 1)
    return AnswerTask(source.name, tuple(train), tuple(kept["validation"]), tuple(kept["test"]))


def read_samples(path: Path, folder: Path) -> list[Sample]:
    """All conversations of a file, in its order. Files are named relative to ``folder`` and not opened.

    The file is one of [`json_rows`], a sample one of [`read_talk`]; other keys are left alone.

    Raises:
        ConfigError: the file is not there, is no JSON, or a sample is none.
    """
    samples, wrong = [], []
    try:
        for place, value in json_rows(path):
            try:
                samples.append(_sample(value, f"{path.name}: {place}", folder))
            except ValueError as error:
                wrong.append(f"{place} {error}")
    except (OSError, ValueError) as error:
        raise ConfigError(f"load_workload: {path} must {fault(error)}") from error
    if wrong:
        raise ConfigError(
            f"load_workload: every sample of {path} must be a question with its answer, got {len(wrong)} that "
            f"{'is' if len(wrong) == 1 else 'are'} none: {listed(wrong)}"
        )
    if not samples:
        raise ConfigError(f"load_workload: {path} must hold samples, got none")
    return samples


def _sample(value: Any, place: str, folder: Path) -> Sample:
    """Raises ValueError with what goes after the sample's place."""
    talk = read_talk(value)
    return Sample(
        place,
        tuple(
            Turn(tuple(_part(piece) for piece in pieces if piece.strip()), answer.strip())
            for pieces, answer in talk.turns
        ),
        images=tuple(folder / name for name in talk.files["image"]),
        videos=tuple(folder / name for name in talk.files["video"]),
    )


def _part(piece: str) -> tuple[str, str]:
    return (piece[1:-1], "") if MARK.fullmatch(piece) else ("text", piece.strip())


def sound_samples(samples: Iterable[Sample], task: str, faults: Faults) -> list[Sample]:
    """Those with a question and an answer in every turn, whose texts and names can be read.

    Unreadable ones are left out even where they are to be refused: nothing after this takes them.
    """
    kept = []
    for sample in samples:
        missing = [
            name
            for name, there in (
                ("question", all(any(kind == "text" for kind, _ in turn.parts) for turn in sample.turns)),
                ("answer", all(turn.answer for turn in sample.turns)),
            )
            if not there
        ]
        stays = not missing or faults.add("empty_answer", task, sample.place, f"no {' and no '.join(missing)}")
        if why := _broken(sample):
            faults.add("broken_text", task, sample.place, why)
        elif stays:
            kept.append(sample)
    return kept


def _broken(sample: Sample) -> str:
    turns = tuple((tuple(text for _, text in turn.parts), turn.answer) for turn in sample.turns)
    names = {"image": tuple(map(str, sample.images)), "video": tuple(map(str, sample.videos))}
    return broken_in(Talk(turns, names))


def _files(sample: Sample) -> Iterator[tuple[Path, bool]]:
    yield from ((path, False) for path in sample.images)
    yield from ((path, True) for path in sample.videos)


def split_samples(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """A share of the samples and the rest, both in order; samples that share a file are in the same part."""
    groups = _groups(samples)
    numbers = list(dict.fromkeys(groups))
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = Counter(groups)
    wanted, taken = fraction * len(samples), 0
    chosen: set[int] = set()
    for place in order:
        size = sizes[numbers[place]]
        if taken + size / 2 <= wanted or (fraction and not chosen):
            chosen.add(numbers[place])
            taken += size
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for sample, number in zip(samples, groups, strict=True):
        parts[number not in chosen].append(sample)
    return parts


def _groups(samples: Sequence[Sample]) -> list[int]:
    """A number for each sample: the same for two that share a file, directly or through others."""
    parent = list(range(len(samples)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    first: dict[Path, int] = {}
    for place, sample in enumerate(samples):
        for path in sample.files:
            parent[root(place)] = root(first.setdefault(path, place))
    return [root(place) for place in range(len(samples))]
