"""What a model that answers is asked and how that is scored: a user's own samples, or the field's benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from keeplora.methods.settings import ConfigError
from keeplora.tasks import field
from keeplora.tasks.own.config import DataSettings, OwnTasks
from keeplora.tasks.own.faults import Faults
from keeplora.tasks.own.instructions import AnswerTask, Look, Sample, Turn, read_task, sound_samples, split_samples
from keeplora.tasks.own.splits import thinned
from keeplora.tasks.scoring import (
    Prediction,
    Score,
    caption_score,
    exact_match,
    exact_match_score,
    judged_score,
    mllm_dcl_prompt,
    mllm_dcl_score,
    mllm_dcl_share,
)
from keeplora.tasks.scoring.captions import WITHOUT_JAVA

__all__ = ["Asked", "read_asked"]

_JUDGED = "the public score is a judge model's; here an answer counts where it is exactly the right one"


@dataclass(frozen=True)
class Asked:
    """A task with its rule: the score of all predictions, and where the rule has it whether one is right."""

    task: AnswerTask
    scored: Callable[[Sequence[Prediction]], Score] | None
    """None: captions, scored by their samples' references."""
    right: Callable[[Prediction], bool] | None
    notes: tuple[str, ...] = ()

    def score(self, samples: Sequence[Sample], texts: Sequence[str]) -> Score:
        """The score of what a model wrote for some samples."""
        if self.scored is not None:
            return self.scored(_predictions(samples, texts))
        told = {str(number): text for number, text in enumerate(texts)}
        return caption_score(told, {str(number): sample.references for number, sample in enumerate(samples)})

    def correct(self, samples: Sequence[Sample], texts: Sequence[str]) -> list[bool]:
        """Which answers are right.

        Raises:
            ConfigError: the rule gives marks to all of them together, or shares.
        """
        if self.right is None:
            raise ConfigError(
                f"evaluate: every answer of task {self.task.name!r} must be right or wrong for a paired test, got "
                "captions, which are scored together. Compare without fronts"
            )
        return [self.right(prediction) for prediction in _predictions(samples, texts)]

    def few(self, most: int) -> Asked:
        """The task with fewer samples to evaluate, evenly spaced; 0: all."""
        validation, test = (tuple(thinned(samples, most)) for samples in (self.task.validation, self.task.test))
        return replace(self, task=replace(self.task, validation=validation, test=test))


def _predictions(samples: Sequence[Sample], texts: Sequence[str]) -> list[Prediction]:
    return [
        Prediction(text, sample.answer, sample.question, sample.told)
        for sample, text in zip(samples, texts, strict=True)
    ]


def read_asked(own: OwnTasks, faults: Faults, look: Look) -> list[Asked]:
    """The tasks in learning order, the witness last. Images and videos of a user's own are looked at once.

    Raises:
        ConfigError: data is missing, or not what it is said to be.
    """
    if not own.benchmark:
        return [Asked(read_task(source, own, faults, look), exact_match_score, _exact) for source in own.all]
    root = own.data_root
    missing = own.data.faults.get("missing") == "skip"
    found = field.read_instructions(root, own.benchmark, allow_missing=missing)
    video = field.instruction_benchmark(own.benchmark).kind == "video"
    asked = [_of_field(one, "video" if video else "image") for one in found]
    return [_validated(replace(one, task=_sound(one.task, faults)), own.data) for one in asked]


def _sound(task: AnswerTask, faults: Faults) -> AnswerTask:
    return AnswerTask(task.name, *(tuple(sound_samples(samples, task.name, faults)) for _, samples in task.splits))


def _validated(asked: Asked, data: DataSettings) -> Asked:
    """The task with a share of its training samples kept for validation, as with a user's own."""
    if not data.validation_fraction or asked.scored is None:  # training samples have no reference captions
        return asked
    kept, train = split_samples(asked.task.train, data.validation_fraction, data.split_seed + 1)
    return replace(asked, task=replace(asked.task, train=tuple(train), validation=tuple(kept)))


def _exact(prediction: Prediction) -> bool:
    return exact_match(prediction.text, prediction.answer.strip())


def _of_field(found: field.InstructionSet, kind: str) -> Asked:
    name, rule = found.task.name, found.task.scoring
    domain = rule.removeprefix("MLLM-DCL ") if rule.startswith("MLLM-DCL ") else ""

    def sample(question: field.Question, place: str) -> Sample:
        text = mllm_dcl_prompt(domain, question.text, question.answer) if domain else question.text
        images, videos = ((question.path,), ()) if kind == "image" else ((), (question.path,))
        turn = Turn(((kind, ""), ("text", text.strip())), question.answer.strip())
        return Sample(f"{name}: {place} {question.id}", (turn,), images, videos, told=question.told_path)

    train = tuple(sample(question, "training sample") for question in found.train)
    test = [sample(question, "question") for question in found.test]
    notes = list(found.notes)
    if found.captions is not None:
        references, told = field.read_captions(found.captions, found.test)
        notes += told
        held = {f"{name}: question {key}": captions for key, captions in references.items()}
        test = [replace(one, references=tuple(held[one.place])) for one in test if one.place in held]
        notes.append(f"{name} is scored by the mean of seven caption metrics; {', '.join(WITHOUT_JAVA)}")
        return Asked(AnswerTask(name, train, (), tuple(test)), None, None, tuple(notes))
    task = AnswerTask(name, train, (), tuple(test))
    if domain:
        return Asked(
            task, lambda predictions: mllm_dcl_score(domain, predictions),
            lambda prediction: mllm_dcl_share(domain, prediction) == 1.0, tuple(notes),
        )  # fmt: skip
    if rule == "judge":
        return Asked(task, judged_score, _exact, (*notes, _JUDGED))
    return Asked(task, exact_match_score, _exact, tuple(notes))
