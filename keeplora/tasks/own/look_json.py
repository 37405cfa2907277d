"""Questions with answers, recognised by content: which files hold them, and where their images are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keeplora._messages import listed
from keeplora._untrusted import fault
from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.broken import broken_in, broken_name
from keeplora.tasks.own.faults import Fault
from keeplora.tasks.own.forms import MARK, Talk, is_talk, read_talk
from keeplora.tasks.own.json_rows import json_rows
from keeplora.tasks.own.look_tree import DataTask, Folder, split_of

__all__ = ["json_tasks"]

_Part = tuple[Path, dict[str, Talk | str]]
TRIED = 200
"""Samples whose images are looked for, to see where paths begin."""
_NOT_SAMPLES = ("dataset_info.json", "state.json", "dataset_dict.json")


def json_tasks(folder: Folder, root: Path) -> tuple[list[DataTask], list[str]]:
    """The tasks that JSON and JSONL files of one folder are, and why other such files are none.

    Files belong together whose names differ by the split alone: ``birds_train.json`` and ``birds_test.json``.

    Args:
        root: The folder that the user named: images may lie there, too.

    Raises:
        ConfigError: two files are the same split of one task, or a task has no training samples.
    """
    groups: dict[str, dict[str, _Part]] = {}
    others = []
    for name in folder.files:
        if not name.lower().endswith((".json", ".jsonl")) or name in _NOT_SAMPLES:
            continue
        path = folder.path / name
        try:
            samples = _talks(path)
        except ValueError as error:
            others.append(f"{path} must {error}")
            continue
        if samples is None and path.suffix.lower() == ".jsonl":
            continue  # it may be a table: look_datasets says what it is
        if samples is None:
            others.append(f"{path} holds no questions with answers")
            continue
        split, rest = split_of(path.stem)
        parts = groups.setdefault(rest, {})
        if (clash := parts.get(split or "train")) is not None:
            raise ConfigError(
                f"look: every task must have one file for each split, got {clash[0].name} and {name} in "
                f"{folder.path}. Put each task into a folder of its own, or join the files"
            )
        parts[split or "train"] = (path, samples)
    own = folder.path.name or "data"
    return [_task(own if len(groups) == 1 or not rest else rest, parts, folder, root)
            for rest, parts in groups.items()], others  # fmt: skip


def _talks(path: Path) -> dict[str, Talk | str] | None:
    """Of every sample its place and what it says, or why that cannot be read; None: it holds something else.

    Raises:
        ValueError: the file cannot be read or parsed; the text goes after "must".
    """
    try:
        rows = list(json_rows(path, finite=False))
    except (OSError, ValueError) as error:
        raise ValueError(fault(error)) from None
    return {place: _talk(row) for place, row in rows} if rows and all(is_talk(row) for _, row in rows) else None


def _talk(row: Any) -> Talk | str:
    try:
        return read_talk(row)
    except ValueError as error:
        return str(error)


def _task(name: str, parts: Mapping[str, _Part], folder: Folder, root: Path) -> DataTask:
    if "train" not in parts:
        names = listed([path.name for path, _ in parts.values()])
        raise ConfigError(
            f"look: every task must have training samples, got only {names} in {folder.path}. Call the file train.json"
        )
    train = parts["train"][0]
    samples = [talk for split in parts for talk in parts[split][1].values() if isinstance(talk, Talk)]
    images = [path for talk in samples for path in talk.files["image"] if not broken_name(path)]
    paths = [*images, *(path for talk in samples for path in talk.files["video"] if not broken_name(path))]
    places = list(dict.fromkeys((train.parent, root, train.parent / "images", root / "images")))
    begins, hits, tried = _where_paths_begin(paths, places)
    remarks = []
    if tried and not hits:
        remarks.append(f"none of the first {tried} images of {name} are there, looked for in {_listed(places)}")
    elif tried:
        remarks.append(f"{hits} of the first {tried} images of {name} are there, in {begins}")
    if texts := sum(not any(talk.files.values()) for talk in samples):
        remarks.append(f"{texts} of {len(samples)} samples of {name} have no image")
    there = {path: (begins / path).is_file() for path in paths}
    faults = [Fault("missing", name, path) for path, is_there in there.items() if not is_there]
    for file, talks in parts.values():
        strange = [f"{place} {talk}" for place, talk in talks.items() if isinstance(talk, str)]
        if strange:
            remarks.append(f"a run refuses {len(strange)} samples of {file}: {listed(strange)}")
        for place, talk in talks.items():
            if isinstance(talk, Talk) and _is_empty(talk):
                faults.append(Fault("empty_answer", name, f"{file.name}: {place}"))
            if isinstance(talk, Talk) and (why := broken_in(talk)):
                faults.append(Fault("broken_text", name, f"{file.name}: {place}", why))
    return DataTask(
        name=name,
        kind="json",
        place=train,
        counts={split: len(entries) for split, (_, entries) in parts.items()},
        test=parts["test"][0] if "test" in parts else None,
        validation=parts["validation"][0] if "validation" in parts else None,
        images=None if begins == train.parent else begins,
        pictures=tuple(str(begins / path) for path in dict.fromkeys(images) if there[path]),
        faults=tuple(faults),
        remarks=tuple(remarks),
    )


def _where_paths_begin(paths: Sequence[str], places: Sequence[Path]) -> tuple[Path, int, int]:
    """The place that most of the first paths lead from to a file, how many do, and of how many."""
    tried = list(dict.fromkeys(paths))[:TRIED]
    hits = {place: sum((place / path).is_file() for path in tried) for place in places}
    best = max(places, key=lambda place: hits[place])  # of equals the first
    return best, hits[best], len(tried)


def _listed(places: Sequence[Path]) -> str:
    return listed([str(place) for place in places], len(places))


def _is_empty(talk: Talk) -> bool:
    """Whether a question or an answer is missing, beside where the image goes."""
    return any(
        not answer.strip() or all(MARK.fullmatch(piece) or not piece.strip() for piece in pieces)
        for pieces, answer in talk.turns
    )
