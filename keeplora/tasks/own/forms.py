"""The forms in which people write a question and its answer: LLaVA's, ShareGPT's, OpenAI's messages, plain pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from keeplora._messages import listed

__all__ = ["MARK", "Talk", "is_talk", "read_talk"]

MARK = re.compile("(<image>|<video>)")
_TURNS = ("conversations", "conversation", "messages")
_QUESTIONS = ("text", "question")
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")
_Content = tuple[Any, str]
"""What a turn holds, and where it is."""
_KINDS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}


@dataclass(frozen=True)
class Talk:
    """Questions, each in pieces of text with ``<image>`` and ``<video>`` between them, answers, and the files named."""

    turns: tuple[tuple[tuple[str, ...], str], ...]
    files: Mapping[str, tuple[str, ...]]
    """Of ``"image"`` and ``"video"``, in the order in which the questions name them."""


def is_talk(value: Any) -> bool:
    """Whether this is meant for a conversation, or for a question with its number or its answer."""
    if not isinstance(value, Mapping):
        return False
    if any(name in value for name in _TURNS):
        turns = next(value[name] for name in _TURNS if name in value)
        return isinstance(turns, list) and all(isinstance(turn, Mapping) for turn in turns)
    return any(name in value for name in _QUESTIONS) and any(name in value for name in ("question_id", "answer"))


def read_talk(value: Any) -> Talk:
    """A conversation, with as many files as marks: files without marks come before the first question.

    Read are ``"conversations"`` (LLaVA, ShareGPT) and ``"messages"`` (OpenAI) of turns with ``"from"`` or ``"role"``
    and ``"value"`` or ``"content"``, which is text or a list of parts; and ``"text"`` or ``"question"`` with
    ``"answer"``. What is null or not there is an empty text. Files stand under ``"image"``, ``"images"``, ``"video"``,
    ``"videos"``, or in the parts.

    Raises:
        ValueError: it is none of these, or could mean two things; the text goes after the sample's place.
    """
    if not isinstance(value, Mapping):
        raise ValueError("must be an object")
    files = {kind: _names(value, kind) for kind in ("image", "video")}
    inside: dict[str, list[str]] = {"image": [], "video": []}
    said = _said(value)
    questions = [_pieces(*question, inside) for question, _ in said]
    answers = [_answer(*answer) for _, answer in said]
    for kind, named in inside.items():
        marks = sum(piece == f"<{kind}>" for pieces in questions for piece in pieces)
        if named and files[kind]:
            raise ValueError(f"must name every {kind} once, got {kind}s in the parts of turns and beside them")
        if named and marks != len(named):
            raise ValueError(
                f"must mark {kind}s by parts or by <{kind}>, got {len(named)} parts with a file and "
                f"{marks - len(named)} other marks"
            )
        files[kind] = files[kind] or named
        if not marks:
            questions[0] = [f"<{kind}>"] * len(files[kind]) + questions[0]
        elif marks != len(files[kind]):
            raise ValueError(f"must name as many {kind}s as it has marks <{kind}>, got {len(files[kind])} and {marks}")
    turns = tuple((tuple(pieces), answer) for pieces, answer in zip(questions, answers, strict=True))
    return Talk(turns, {kind: tuple(names) for kind, names in files.items()})


def _said(value: Mapping[str, Any]) -> list[tuple[_Content, _Content]]:
    """Questions and answers, in pairs; the last answer is empty where there is none."""
    there = [name for name in _TURNS if name in value]
    if len(there) > 1:
        raise ValueError(f"must have its turns once, got {' and '.join(there)}")
    if not there:
        asked = [name for name in _QUESTIONS if name in value]
        if len(asked) != 1:
            raise ValueError(
                f"must have conversations or messages, or text and answer, got "
                f"{' and '.join(asked) or 'no text and no answer'} in "
                f"{listed([str(name)[:40] for name in value], 6) or 'nothing'}"
            )
        return [((value[asked[0]], asked[0]), (value.get("answer"), "answer"))]
    turns = value[there[0]]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"must have {there[0]}, a list of turns")
    contents: list[_Content] = []
    for number, turn in enumerate(turns, 1):
        speaker, content = _turn(turn, number)
        if speaker == "system" and not contents:
            if content in ("", None, []):
                continue
            raise ValueError(
                f"must begin with a question, got text of the system in turn {number}, which models treat each in "
                "their own way. Write it before the first question"
            )
        if speaker not in (_ANSWERS if len(contents) % 2 else _ASKS):
            raise ValueError(
                f"must have turns from human (or user) and gpt (or assistant) in turn, got {str(speaker)[:80]!r} in "
                f"turn {number}"
            )
        contents.append((content, f"turn {number}"))
    if not contents:
        raise ValueError(f"must have a question in {there[0]}, got none")
    return list(zip(contents[::2], [*contents[1::2], *([("", "")] if len(contents) % 2 else [])], strict=True))


def _turn(turn: Any, number: int) -> tuple[Any, Any]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"must have turns that are objects, got {str(turn)[:80]!r} in turn {number}")
    chosen = []
    for names in (("from", "role"), ("value", "content")):
        there = [name for name in names if name in turn]
        if len(there) != 1:
            raise ValueError(
                f"must have {names[0]} (or {names[1]}) once in every turn, got {' and '.join(there) or 'neither'} in "
                f"turn {number}"
            )
        chosen.append(turn[there[0]])
    if turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError(f"must have turns of text, got a call of a tool in turn {number}")
    return chosen[0], chosen[1]


def _pieces(content: Any, where: str, files: dict[str, list[str]]) -> list[str]:
    """Text and marks of a question; files that its parts name are put into ``files``."""
    if not isinstance(content, list):
        return MARK.split(_text(content, where))
    pieces: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            pieces += MARK.split(_text(part.get("text"), where))
        elif kind in _KINDS:
            pieces.append(f"<{_KINDS[kind]}>")
            if (name := _named(part, kind, where)) is not None:
                files[_KINDS[kind]].append(name)
        else:
            raise ValueError(
                f"must have parts of type text, image_url, image or video, got {str(kind or part)[:80]!r} in {where}"
            )
    return pieces


def _named(part: Mapping[str, Any], kind: str, where: str) -> str | None:
    """The file of a part; None where it stands beside the turns."""
    value = next((part[name] for name in (kind, "url", "path", "image", "video") if name in part), None)
    if isinstance(value, Mapping):
        value = value.get("url")
    if value is None and set(part) <= {"type", "index"}:
        return None
    if not isinstance(value, str) or not value:
        raise ValueError(f"must name a file in every part of type {kind}, got {str(value)[:80]!r} in {where}")
    return _local(value, where)


def _local(name: str, where: str) -> str:
    """A file's name; a URL of a file is one."""
    scheme, separator, rest = name.partition(":")
    if separator and scheme.lower() in ("http", "https", "data", "s3", "gs", "ftp"):
        raise ValueError(
            f"must name files, got a {scheme.lower()} address in {where}: {name[:60]!r}. Nothing is downloaded or "
            "unpacked: save the file and write its path"
        )
    if name.startswith("file://"):
        return unquote(rest.removeprefix("//").removeprefix("localhost"))
    return name


def _answer(content: Any, where: str) -> str:
    if not isinstance(content, list):
        return _text(content, where)
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) != 1 or len(content) != 1:
        raise ValueError(f"must have answers of one part of text, got {len(content)} parts in {where}")
    return _text(texts[0], where)


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # answers of counting tasks
    if not isinstance(value, str):
        raise ValueError(f"must have text in {where}, got {str(value)[:80]!r}")
    return value


def _names(value: Mapping[str, Any], kind: str) -> list[str]:
    there = [name for name in (kind, f"{kind}s") if value.get(name) not in (None, "", [])]
    if len(there) > 1:
        raise ValueError(f"must name its {kind}s once, got {' and '.join(there)}")
    named = value[there[0]] if there else []
    names: Sequence[Any] = named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"must have a file or a list of files for {kind}, got {str(named)[:80]!r}")
    return [_local(name, kind) for name in names]
