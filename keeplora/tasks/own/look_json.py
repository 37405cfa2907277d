"""Samples in LLaVA's form, recognised by content: which files hold them, and where their images are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keeplora._messages import listed
from keeplora._untrusted import fault, parse_json, read_bytes
from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.faults import Fault
from keeplora.tasks.own.look_tree import DataTask, Folder, split_of

__all__ = ["is_sample", "json_tasks", "read_samples", "records"]

MOST = 2**31
"""Bytes of a file with samples: LLaVA's own mix of 665 thousand has half of them."""
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
    groups: dict[str, dict[str, tuple[Path, list[dict[str, Any]]]]] = {}
    others = []
    for name in folder.files:
        if not name.lower().endswith((".json", ".jsonl")) or name in _NOT_SAMPLES:
            continue
        path = folder.path / name
        try:
            samples = read_samples(path)
        except ValueError as error:
            others.append(f"{path} must {error}")
            continue
        if samples is None and path.suffix.lower() == ".jsonl":
            continue  # it may be a table: look_datasets says what it is
        if samples is None:
            others.append(f"{path} holds no samples in LLaVA's form")
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


def read_samples(path: Path) -> list[dict[str, Any]] | None:
    """The samples of a file, or None where it holds something else.

    Raises:
        ValueError: it cannot be read or parsed; the text goes after "must".
    """
    entries = records(path)
    samples = [entry for entry in entries if isinstance(entry, dict) and is_sample(entry)]
    return samples if samples and len(samples) == len(entries) else None


def records(path: Path) -> list[Any]:
    """What a JSON file lists, or the lines of a JSONL file; nothing for a JSON file that is no list.

    Raises:
        ValueError: as `read_samples`.
    """
    try:
        raw = read_bytes(path, most=MOST)
        listed_whole = raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        if path.suffix.lower() == ".jsonl" or (not listed_whole and b"\n{" in raw):  # as `read_samples` tells them
            return [parse_json(line, finite=False) for line in raw.splitlines() if line.strip()]
        values = parse_json(raw, finite=False)
    except (OSError, ValueError) as error:
        raise ValueError(fault(error)) from None
    return values if isinstance(values, list) else []


def is_sample(entry: Mapping[str, Any]) -> bool:
    """Whether this is a conversation, or a question with a number or an answer."""
    if isinstance(turns := entry.get("conversations"), list):
        return all(isinstance(turn, dict) and "from" in turn and "value" in turn for turn in turns)
    return "text" in entry and ("question_id" in entry or "answer" in entry)


def _task(name: str, parts: Mapping[str, tuple[Path, list[dict[str, Any]]]], folder: Folder, root: Path) -> DataTask:
    if "train" not in parts:
        names = listed([path.name for path, _ in parts.values()])
        raise ConfigError(
            f"look: every task must have training samples, got only {names} in {folder.path}. Call the file train.json"
        )
    train = parts["train"][0]
    samples = [sample for split in parts for sample in parts[split][1]]
    images = [path for sample in samples for path in _paths(sample, "image")]
    paths = [*images, *(path for sample in samples for path in _paths(sample, "video"))]
    places = list(dict.fromkeys((train.parent, root, train.parent / "images", root / "images")))
    begins, hits, tried = _where_paths_begin(paths, places)
    remarks = []
    if tried and not hits:
        remarks.append(f"none of the first {tried} images of {name} are there, looked for in {_listed(places)}")
    elif tried:
        remarks.append(f"{hits} of the first {tried} images of {name} are there, in {begins}")
    if texts := sum(not (_paths(sample, "image") or _paths(sample, "video")) for sample in samples):
        remarks.append(f"{texts} of {len(samples)} samples of {name} have no image")
    there = {path: (begins / path).is_file() for path in paths}
    faults = [Fault("missing", name, path) for path, is_there in there.items() if not is_there]
    for file, entries in parts.values():
        empty = [place for place, sample in enumerate(entries) if _is_empty(sample)]
        faults += [Fault("empty_answer", name, f"{file.name}, sample {place}") for place in empty]
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


def _paths(sample: Mapping[str, Any], kind: str) -> list[str]:
    """The files that a sample names: its ``"image"``, one or a list, or its ``"video"``."""
    value = sample.get(kind)
    return [path for path in (value if isinstance(value, list) else [value]) if isinstance(path, str) and path]


def _where_paths_begin(paths: Sequence[str], places: Sequence[Path]) -> tuple[Path, int, int]:
    """The place that most of the first paths lead from to a file, how many do, and of how many."""
    tried = list(dict.fromkeys(paths))[:TRIED]
    hits = {place: sum((place / path).is_file() for path in tried) for place in places}
    best = max(places, key=lambda place: hits[place])  # of equals the first
    return best, hits[best], len(tried)


def _listed(places: Sequence[Path]) -> str:
    return listed([str(place) for place in places], len(places))


def _is_empty(sample: Mapping[str, Any]) -> bool:
    """Whether a question or an answer is missing, beside where the image goes."""
    if isinstance(turns := sample.get("conversations"), list):
        said = [(turn["from"], str(turn["value"]).replace("<image>", "").strip()) for turn in turns]
        sides = {"human": False, "gpt": False}
        for who, text in said:
            sides["human" if who in ("human", "user") else "gpt"] |= bool(text)
        return not all(sides.values()) or any(who in ("gpt", "assistant") and not text for who, text in said)
    question = str(sample.get("text", "")).replace("<image>", "").strip()
    answer = sample.get("answer")
    return not question or answer is None or not str(answer).strip()
