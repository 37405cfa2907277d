"""A user's own questions about images or videos, learned by a vision-language model of transformers that answers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keeplora._files import told
from keeplora._messages import listed, suggest
from keeplora.methods.settings import ConfigError
from keeplora.statistics.passes import evaluating
from keeplora.tasks.own.asked import Asked, read_asked
from keeplora.tasks.own.config import OwnTasks
from keeplora.tasks.own.contents import content, relative
from keeplora.tasks.own.faults import Faults
from keeplora.tasks.own.generator import load_generator
from keeplora.tasks.own.instructions import SPLITS, AnswerTask, Sample
from keeplora.tasks.own.media import Loaded, Media, Pending
from keeplora.tasks.own.prompts import Prompts
from keeplora.tasks.own.splits import thinned
from keeplora.tasks.own.videos import FRAMES
from keeplora.tasks.workload import Batches, ModelOrigin

__all__ = ["AnswerWorkload"]

Batch = dict[str, Tensor]


class AnswerWorkload:
    """Tasks of LLaVA-style samples for a vision-language model, as the training loop takes them.

    The loss is the cross-entropy of the answers' tokens and of the token that ends each, in float32, averaged over
    these tokens of the batch: what transformers computes from labels that are −100 everywhere else. An answer counts as
    right where ``prediction.strip().upper() == answer.strip().upper()``; predictions are generated greedily, in
    batches padded on the left. Of several turns the last is asked, the earlier ones come with their answers.

    Args:
        own: Settings with ``own.answers``.
        device: Where batches are put.

    Raises:
        ConfigError: whatever is wrong with the settings, the data or the model; all before anything is trained.
    """

    def __init__(self, own: OwnTasks, device: str = "cpu") -> None:
        if missing := [name for name in ("transformers", "PIL") if find_spec(name) is None]:
            raise ConfigError(
                f"load_workload: tasks of json must have what they need installed, got no {' and no '.join(missing)}. "
                "Run pip install 'keeplora[vlm]'"
            )
        self.own, self.device = own, device
        self._faults = Faults(own.data)
        self._left_out: list[str] = []
        self._generator = load_generator(own)
        self._processor = self._generator.processor
        self._prompts = Prompts(self._processor, self._generator.ends)
        self._media = Media(own, self._processor)
        self._lengths: dict[Any, int] = {}
        asked = [one.few(own.data.evaluate_at_most) for one in read_asked(own, self._faults, self._media.look)]
        self._faults.refuse()  # before files are opened that may not be there
        asked = [replace(one, task=self._checked(one.task)) for one in asked]
        self._faults.refuse()
        self._asked, self._asked_witness = asked, asked.pop() if own.witness is not None else None
        for task in self._all:
            self._check_splits(task)
        self._model = self._generator.model()

    @property
    def tasks(self) -> Sequence[str]:
        """Names in learning order."""
        return [one.task.name for one in self._asked]

    @property
    def witness(self) -> str | None:
        """Name of the task that is never trained."""
        return None if self._asked_witness is None else self._asked_witness.task.name

    @property
    def _all(self) -> list[AnswerTask]:
        return [one.task for one in (*self._asked, *([] if self._asked_witness is None else [self._asked_witness]))]

    def fingerprint(self) -> str:
        """Hash of all samples' texts, answers and files (names and bytes), of the processor, and of the weights."""
        digest = hashlib.sha256()

        def add(*texts: object) -> None:
            for text in texts:
                digest.update(f"{text}\0".encode())

        for task in self._all:
            add(task.name)
            for split, samples in task.splits:
                add(split, len(samples))
                for sample in samples:
                    add(self._prompts.whole(sample), *(turn.answer for turn in sample.turns))
                    for path in sample.files:
                        add(relative(path, Path(self.own.base)), content(path))
        add(self.own.new_tokens, self._generator.settings())
        for name, weight in self._model.state_dict().items():
            add(name)
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def contents(self, task: int | None, split: str) -> str:
        """Hash of what evaluating a split depends on besides the model: samples in their order, and how each counts."""
        samples, made = self.samples(task, split), self._generator
        told: list[object] = [self.own.benchmark, self.chosen(task).task.name, split, self.own.new_tokens, FRAMES]
        told += [made.settings(), made.tokens, made.ends, made.dtype, len(samples)]
        for sample in samples:
            told += [self._prompts.question(sample), sample.answer, sample.question, sample.references, sample.told]
            told += [content(path) for path in sample.files]
        return hashlib.sha256("\0".join(map(repr, told)).encode()).hexdigest()

    def notes(self) -> list[str]:
        """What a reader of the results has to know: how it was scored and asked, and what of the data was changed."""
        seen = any(sample.videos for task in self._all for _, samples in task.splits for sample in samples)
        return [
            "an answer is right if it equals the sample's, case and outer spaces aside; it is generated greedily, with "
            f"at most {self.own.new_tokens} tokens",
            "the loss is the mean over the tokens of a batch's answers",
            self._prompts.note(),
            *(
                f"{task.name}: {', '.join(f'{len(samples)} {split}' for split, samples in task.splits)} samples"
                for task in self._all
            ),
            *([f"of every video {FRAMES} frames are taken, evenly spaced"] if seen else []),
            *self._told_quick(),
            *self._media.notes(),
            *(note for one in (*self._asked, *filter(None, [self._asked_witness])) for note in one.notes),
            *self._faults.notes(),
            *self._told_left_out(),
        ]

    def _told_quick(self) -> list[str]:
        most = self.own.data.evaluate_at_most
        return [f"a quick look: at most {most} samples of a split are evaluated, evenly spaced"] if most else []

    def _told_left_out(self) -> list[str]:
        if not self._left_out:
            return []
        return [
            f"{len(self._left_out)} samples longer than the model's context are left out, as no cut leaves images, "
            f"question and an answer: {listed(self._left_out)}"
        ]

    def model(self) -> nn.Module:
        """A fresh copy of the pretrained model, the same every time."""
        return copy.deepcopy(self._model)

    def batches(self, task: int, batch_size: int, seed: int) -> Batches:
        """One pass over the training samples in an order that ``seed`` alone decides, padded on the right."""
        return _Pass(self, self._asked[task].task.train, batch_size, seed)

    def evenly(self, task: int, batch_size: int, seed: int, share: float) -> Batches:
        """A pass over a share of the training samples, evenly spaced in their file."""
        samples = self._asked[task].task.train
        return _Pass(self, thinned(samples, max(1, round(share * len(samples)))), batch_size, seed)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean cross-entropy of the answers' tokens, in float32."""
        loss: Tensor = model(**batch, use_cache=False).loss
        return loss

    def accuracy(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> float:
        """The score of ``split``, from 0 to 1: with samples of one's own the share of exact answers.

        Captions' mean score may pass 100 %, where it counts as 1.
        """
        score = self.chosen(task).score(self.samples(task, split), self.predictions(model, task, split, batch_size))
        return min(score.percent / 100, 1.0)

    def correct(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> Tensor:
        """Which samples are answered right: bool [n], in the split's order."""
        samples = self.samples(task, split)
        return torch.tensor(self.chosen(task).correct(samples, self.predictions(model, task, split, batch_size)))

    @torch.no_grad()
    def predictions(self, model: nn.Module, task: int | None, split: str, batch_size: int) -> list[str]:
        """What the model answers to every sample of ``split``, in its order."""
        samples = self.samples(task, split)
        texts: list[str] = []
        generator: Any = model
        with evaluating(model):
            for group, media in self._loaded(_chunks(samples, batch_size)):
                inputs = self._inputs([self._prompts.question(s) for s in group], group, media, side="left")
                tokens, asked = generator.generate(**inputs), inputs["input_ids"]
                if not torch.equal(tokens[:, : asked.shape[1]], asked):
                    raise ValueError(
                        "accuracy: the model's generate must return questions with their answers, got other tokens "
                        f"from {type(model).__name__}"
                    )
                tokens = tokens[:, asked.shape[1] :]
                texts += self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts

    def chosen(self, task: int | None) -> Asked:
        """The task with this place in the order; None means the witness."""
        chosen = self._asked_witness if task is None else self._asked[task]
        assert chosen is not None
        return chosen

    def evaluated(self, task: int, split: str = "test") -> int:
        """How many samples of a task's split are evaluated."""
        return len(dict(self._asked[task].task.splits)[split])

    @property
    def origin(self) -> ModelOrigin:
        """Where the pretrained model comes from."""
        return ModelOrigin("transformers", self._generator.name, "visual-question-answering")

    def save_model(self, model: nn.Module, folder: Path) -> str:
        """Write a merged model and its processor as transformers does; returns the line of Python that loads it."""
        folder.mkdir(parents=True, exist_ok=True)
        saved: Any = model
        with told(folder):
            saved.save_pretrained(folder)
            self._processor.save_pretrained(folder)
        return f'transformers.AutoModelForImageTextToText.from_pretrained("{folder.resolve()}")'

    def samples(self, task: int | None, split: str) -> tuple[Sample, ...]:
        """Those of a task's split; None: the witness's.

        Raises:
            ValueError: there is no such split, or no such sample in it.
        """
        chosen = self.chosen(task).task
        if split not in SPLITS:
            raise ValueError(
                f"accuracy: split must be one of {', '.join(SPLITS)}, got {split!r}{suggest(split, SPLITS)}"
            )
        samples: tuple[Sample, ...] = getattr(chosen, split)
        if not samples:
            raise ConfigError(
                f"accuracy: split {split!r} of task {chosen.name!r} must have samples, got none. "
                "Set validation_fraction in [data], or validation in [[task]]"
            )
        return samples

    # -------------------------------------------------------------- inputs

    def training_batch(self, samples: Sequence[Sample], media: Loaded, *, side: str = "right") -> Batch:
        """What the model is given of whole conversations, with labels; cut at the end of the context."""
        inputs = self._inputs([self._prompts.whole(s) for s in samples], samples, media, side=side)
        inputs["labels"] = self._prompts.labels(samples, inputs["input_ids"])
        context = self._generator.context
        shape = inputs["input_ids"].shape
        if context is None or shape[1] <= context:
            return inputs
        return {name: value[:, :context] if value.shape == shape else value for name, value in inputs.items()}

    def _inputs(self, texts: Sequence[str], samples: Sequence[Sample], media: Loaded, *, side: str) -> Batch:
        """The processor's tensors for texts and what belongs to them, on the device."""
        given: dict[str, Any] = {}
        if any(media.images):
            given |= {"images": media.images, **self._media.settings}
        if any(media.videos):
            given |= {"videos": [video for videos in media.videos for video in videos], "do_sample_frames": False}
        made = self._processor(
            text=list(texts), **given, padding=True, padding_side=side, return_tensors="pt",
            add_special_tokens=self._prompts.adds_specials(texts[0]),
        )  # fmt: skip
        dtype = self._generator.dtype
        moved = {name: value.to(self.device) for name, value in made.items() if isinstance(value, Tensor)}
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in moved.items()}

    def _loaded(self, groups: Sequence[Sequence[Sample]]) -> Iterator[tuple[Sequence[Sample], Loaded]]:
        """Groups of samples with their images and videos; the next group's are decoded while one is used."""
        with ThreadPoolExecutor(self.own.data.readers) as pool:
            waiting: list[tuple[Sequence[Sample], Pending]] = []
            for group in groups:
                waiting.append((group, Pending(group, self._media, pool)))
                if len(waiting) > 1:
                    done, pending = waiting.pop(0)
                    yield done, pending.loaded()
            for done, pending in waiting:
                yield done, pending.loaded()

    def _of(self, sample: Sample) -> Loaded:
        ((_, media),) = self._loaded([[sample]])
        return media

    # -------------------------------------------------------------- checks

    def _checked(self, task: AnswerTask) -> AnswerTask:
        """The task without samples that the context has no room for; what is too long goes to the faults."""
        kept = (
            tuple(sample for sample in samples if self._fits(task.name, sample, split))
            for split, samples in task.splits
        )
        return AnswerTask(task.name, *kept)

    def _fits(self, task: str, sample: Sample, split: str) -> bool:
        self._check_videos(task, sample)
        if why := self._prompts.special_in(sample):
            return self._faults.add("special_token", task, sample.place, why)
        text = self._prompts.whole(sample) if split == "train" else self._prompts.question(sample)
        if split == "train":
            self._prompts.answers(sample)  # refuses what cannot be told apart
        context, new = self._generator.context, 0 if split == "train" else self.own.new_tokens
        if context is None:
            return True
        length = len(self._prompts.tokens(text)) + self._expansion(sample)
        if length + new <= context:
            return True
        room = f"{length} tokens{f' and {new} new ones' if new else ''} in a context of {context}"
        cut = self.own.data.action("long_text") == "cut"
        if cut and (split != "train" or not self._cut_keeps(sample, context)):
            self._left_out.append(f"{sample.place} ({room})")
            return False
        return self._faults.add("long_text", task, sample.place, room)

    def _check_videos(self, task: str, sample: Sample) -> None:
        """Refuse videos that the processor does not take."""
        if sample.videos and getattr(self._processor, "video_processor", None) is None:
            raise ConfigError(
                f"load_workload: the processor of {self._generator.name} must take videos, got "
                f"{type(self._processor).__name__}, which does not, for {sample.place} of task {task!r}"
            )

    def _expansion(self, sample: Sample) -> int:
        """How many tokens more than its text a sample has: images become many. Counted once for images of a size."""
        if not sample.files:
            return 0
        sizes = tuple(self._media.shape(path, video=path in sample.videos) for path in sample.files)
        if sizes not in self._lengths:
            text = self._prompts.question(sample)
            made = self._inputs([text], [sample], self._of(sample), side="right")
            self._lengths[sizes] = made["input_ids"].shape[1] - len(self._prompts.tokens(text))
        return self._lengths[sizes]

    def _cut_keeps(self, sample: Sample, context: int) -> bool:
        """Whether a conversation that is cut keeps all its images and a token of an answer."""
        whole = self._inputs([self._prompts.whole(sample)], [sample], self._of(sample), side="right")["input_ids"]
        labels = self._prompts.labels([sample], whole)
        marks = torch.tensor(self._generator.media_tokens, device=whole.device, dtype=whole.dtype)
        return bool((labels[:, 1:context] >= 0).any()) and not bool(torch.isin(whole[:, context:], marks).any())

    def _check_splits(self, task: AnswerTask) -> None:
        for split, samples in task.splits:
            witness = self._asked_witness is not None and task is self._asked_witness.task
            if not samples and split != "validation" and not (split == "train" and witness):
                raise ConfigError(
                    f"load_workload: task {task.name!r} must have samples to {split}, got none that are left. "
                    "Samples that share an image stay together: where all do, give files test and validation"
                )


@dataclass(frozen=True)
class _Pass:
    """One pass over training samples."""

    workload: AnswerWorkload
    samples: Sequence[Sample]
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.samples), generator=generator).tolist()
        for group, media in self.workload._loaded(_chunks([self.samples[i] for i in order], self.batch_size)):
            yield self.workload.training_batch(group, media)


def _chunks(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]
