"""Questions about images and videos, from the annotation files of UCIT, MLLM-DCL and CL-VISTA."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeplora._messages import listed
from keeplora._untrusted import fault, parse_json, read_bytes
from keeplora.methods.settings import ConfigError

from .catalog import InstructionBenchmark, InstructionTask, instruction_benchmark

__all__ = ["VIDEO_ENDINGS", "InstructionSet", "Question", "read_instructions", "read_rows"]

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv")
"""What a test's video name may lack, in the order it is tried."""

_MOST = 2**31
_SIGNS = ("<image>", "<video>")


@dataclass(frozen=True)
class Question:
    """A question about an image or a video, and its right answer."""

    id: str
    text: str
    """Without the sign for the image or the video."""
    path: Path
    answer: str
    told_path: str
    """As the annotation has it: some scoring rules go by it."""


@dataclass(frozen=True)
class InstructionSet:
    """The questions of a task. ``notes`` tell what a reader of the result should know."""

    task: InstructionTask
    train: Sequence[Question]
    test: Sequence[Question]
    captions: Path | None = None
    """The file of reference captions, for [`read_captions`][]."""
    notes: tuple[str, ...] = ()


def read_instructions(
    root: str | Path, benchmark: str | InstructionBenchmark, *, allow_missing: bool = False
) -> tuple[InstructionSet, ...]:
    """The tasks of an instruction benchmark below ``root``, in order. Images and videos are opened later.

    Args:
        allow_missing: Leave out questions that have no answer or whose image or video is not there, and say so in
            ``notes``. The score is then over fewer questions, and compares with none that is published.

    Raises:
        ConfigError: a file is missing or of another kind; or a question lacks its answer, image or video. All files
            that are missing are named, with where they were looked for, before anything is read.
    """
    chosen = instruction_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
    places = _places(Path(root), chosen)
    return tuple(
        _task(Path(root), chosen, task, folder, allow_missing)
        for task, folder in zip(chosen.tasks, places, strict=True)
    )


def _places(root: Path, chosen: InstructionBenchmark) -> list[Path]:
    places, missing = [], []
    for task in chosen.tasks:
        needs = [each for each in (task.train, task.test, task.captions, task.answers) if each]
        tried = [root / above / folder for above in chosen.annotations for folder in task.folders]
        whole = [place for place in tried if all(_file(place, need) is not None for need in needs)]
        places += whole[:1]
        if not whole:
            there = next((place for place in tried if place.is_dir()), None)
            lacking = [need for need in needs if there is None or _file(there, need) is None]
            looked = ", ".join(place.relative_to(root).as_posix() for place in ([there] if there else tried))
            missing.append(f"{task.name}: no {listed(lacking)} in {looked}")
    if missing:
        raise ConfigError(
            f"read_instructions: root must hold the annotations of {chosen.name}, got {root} with {len(missing)} of "
            f"{len(chosen.tasks)} tasks missing. {'. '.join(missing)}. Unpack them there; nothing is downloaded"
        )
    return places


def _file(place: Path, name: str) -> Path | None:
    """A file of a task: where it is told, or in ``json_row`` beside the training file, or above it."""
    choices = (place / name, place / "json_row" / name, place / "train_json_row" / name, place / Path(name).name)
    return next((path for path in choices if path.is_file()), None)


def _task(root: Path, chosen: InstructionBenchmark, task: InstructionTask, place: Path, allow: bool) -> InstructionSet:
    bases = [place if not each else root / each for each in chosen.images]
    finder = _Finder(bases, VIDEO_ENDINGS if chosen.kind == "video" else ())
    train_file, test_file = _file(place, task.train), _file(place, task.test)
    assert train_file is not None  # _places has looked
    assert test_file is not None
    notes: list[str] = []
    train = [_from_conversation(train_file, i, row, finder) for i, row in enumerate(read_rows(train_file))]
    if task.answers:
        answers_file = _file(place, task.answers)
        assert answers_file is not None
        test = _with_answers(test_file, answers_file, finder, allow, notes)
    else:
        test = [_from_test(test_file, i, row, finder) for i, row in enumerate(read_rows(test_file))]
    train = _present(task, train, train_file, allow, notes)
    test = _present(task, test, test_file, allow, notes)
    return InstructionSet(task, train, test, _file(place, task.captions) if task.captions else None, tuple(notes))


class _Finder:
    """Finds images and videos below the folders that their paths may be relative to; looks into a folder once."""

    def __init__(self, bases: Sequence[Path], endings: Sequence[str]) -> None:
        self.bases, self.endings = bases, ("", *endings)
        self._listed: dict[Path, frozenset[str]] = {}

    def __call__(self, told: str) -> Path:
        if Path(told).is_absolute() or ".." in Path(told).parts:
            raise ConfigError(f"read_instructions: an image or video must be below the root, got {told!r}")
        choices = [base / f"{told}{ending}" for base in self.bases for ending in self.endings]
        return next((path for path in choices if self.is_there(path)), choices[0])

    def is_there(self, path: Path) -> bool:
        if path.parent not in self._listed:
            self._listed[path.parent] = frozenset(os.listdir(path.parent) if path.parent.is_dir() else ())
        return path.name in self._listed[path.parent] and not path.is_dir()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON file that is a list of objects.

    Raises:
        ConfigError: it is none.
    """
    try:
        rows = parse_json(read_bytes(path, most=_MOST))
    except (OSError, ValueError) as error:
        raise ConfigError(f"read_instructions: {path} must {fault(error)}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"read_instructions: {path} must be a list of objects, got {str(rows)[:80]}")
    yield from rows


def _text(path: Path, i: int, row: dict[str, Any], *keys: str) -> str:
    for key in keys:
        if isinstance(row.get(key), str | int):
            return str(row[key])
    raise ConfigError(f"read_instructions: row {i} of {path} must have {' or '.join(keys)}, got {str(row)[:120]}")


def _plain(text: str) -> str:
    """A question without the line for the image or the video, wherever it stands."""
    for sign in _SIGNS:
        text = text.replace(f"{sign}\n", "").replace(f"\n{sign}", "").replace(sign, "")
    return text.strip()


def _from_conversation(path: Path, i: int, row: dict[str, Any], find: Callable[[str], Path]) -> Question:
    match row.get("conversations"):
        case [{"from": "human", "value": str(asked)}, {"from": "gpt", "value": str(answer)}]:
            told = _text(path, i, row, "image", "video")
            return Question(str(row.get("id", i)), _plain(asked), find(told), answer, told)
    raise ConfigError(
        f"read_instructions: row {i} of {path} must have conversations of one human question and one gpt answer, "
        f"got {str(row)[:120]}"
    )


def _from_test(path: Path, i: int, row: dict[str, Any], find: Callable[[str], Path]) -> Question:
    told = _text(path, i, row, "image")
    asked, answer = _text(path, i, row, "text", "question"), _text(path, i, row, "answer")
    return Question(_text(path, i, row, "question_id"), _plain(asked), find(told), answer, told)


def _with_answers(
    path: Path, answers_path: Path, find: Callable[[str], Path], allow: bool, notes: list[str]
) -> list[Question]:
    """Questions with the answers of the same id, not of the same position."""
    answers: dict[str, str] = {}
    for i, row in enumerate(read_rows(answers_path)):
        key = _text(answers_path, i, row, "question_id")
        if answers.setdefault(key, _text(answers_path, i, row, "answer")) != str(row["answer"]):
            raise ConfigError(f"read_instructions: {answers_path} must have one answer to {key!r}, got two")
    rows = [(_text(path, i, row, "question_id"), i, row) for i, row in enumerate(read_rows(path))]
    if len({key for key, _, _ in rows}) < len(rows):
        raise ConfigError(f"read_instructions: {path} must have each question_id once, got one twice")
    lacking = [key for key, _, _ in rows if key not in answers]
    _refuse_or_note(lacking, len(rows), f"an answer in {answers_path}", path, allow, notes)
    questions = []
    for key, i, row in rows:
        if key in answers:
            told = _text(path, i, row, "video_name", "video")
            questions.append(
                Question(key, _plain(_text(path, i, row, "question", "text")), find(told), answers[key], told)
            )
    return questions


def _present(
    task: InstructionTask, questions: Sequence[Question], file: Path, allow: bool, notes: list[str]
) -> list[Question]:
    """The questions whose image or video is there."""
    finder = _Finder((), ())
    there = [finder.is_there(each.path) for each in questions]
    lost = [each.told_path for each, here in zip(questions, there, strict=True) if not here]
    _refuse_or_note(lost, len(questions), f"its image or video on disk ({task.name})", file, allow, notes)
    return [each for each, here in zip(questions, there, strict=True) if here]


def _refuse_or_note(lacking: Sequence[str], count: int, wanted: str, file: Path, allow: bool, notes: list[str]) -> None:
    if not lacking:
        return
    told = f"{len(lacking)} of {count} questions of {file} have not {wanted}: {listed(lacking)}"
    if not allow:
        raise ConfigError(
            f"read_instructions: every question must have {wanted}, got {len(lacking)} of {count} in {file} without: "
            f"{listed(lacking)}. Unpack what is missing, or set allow_missing=True for a score that compares with none"
        )
    notes.append(f"{told}; they are left out, and the score compares with none that is published")
