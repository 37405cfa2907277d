"""Conversations as a model of transformers reads them: its chat template, and which tokens are answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.instructions import Sample, Turn

__all__ = ["IGNORED", "Prompts"]

IGNORED = -100
"""The label of a token that is no answer's, as transformers and cross-entropy take it."""


@dataclass(frozen=True)
class _Answer:
    """Tokens of one turn from where the model begins to speak; the first ``skip`` of them (its name) are no answer."""

    tokens: tuple[int, ...]
    skip: int


class Prompts:
    """Text and labels of samples for one processor.

    Its chat template is used where it has one, else LLaVA-1.5's ``USER: <image>\\nquestion ASSISTANT: answer</s>``.
    Where a template ends answers without an end-of-sequence token, the tokenizer's is put behind each: without one a
    model learns to begin an answer and never to end it.

    Args:
        processor: Of transformers, with a fast tokenizer.
        ends: Tokens at which generation stops.

    Raises:
        ConfigError: the tokenizer is not fast or has no such token, or the template does not extend a conversation.
    """

    def __init__(self, processor: Any, ends: Sequence[int]) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.ends = frozenset(ends)
        self.has_template = bool(getattr(processor, "chat_template", None))
        self.end = ""
        if not self.tokenizer.is_fast:
            raise ConfigError(
                "load_workload: the model's tokenizer must be a fast one, which tells where tokens come from, got "
                f"{type(self.tokenizer).__name__}"
            )
        if not self._ends_answers():
            self.end = self.tokenizer.eos_token or ""
            if not self.end or not self._ends_answers():
                raise ConfigError(
                    "load_workload: answers must end with a token at which generation stops, got none from the chat "
                    "template and none as the tokenizer's eos_token. Set eos_token"
                )

        self._reserved = re.compile("|".join(map(re.escape, sorted(self._reserved_words(), key=len, reverse=True))))

    def special_in(self, sample: Sample) -> str:
        """The first special token of the model in a sample's words, and where; nothing in an ordinary sample.

        Counted are the tokenizer's special tokens, the marks for images and videos, and what the chat template writes
        in angle or square brackets: as words they would end an answer, begin a turn or stand for an image.
        """
        for number, turn in enumerate(sample.turns, 1):
            words = [("question", text) for kind, text in turn.parts if kind == "text"]
            for where, text in (*words, ("answer", turn.answer)):
                if token := self._reserved.search(text):
                    return f"{token[0]} in {where} {number}"
        return ""

    def _reserved_words(self) -> set[str]:
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        marks = {str(getattr(self.processor, f"{kind}_token", None) or "") for kind in ("image", "video")}
        template = set(re.findall(r"<[^<>\s]+>|\[/?[A-Z_]+\]", self.whole(_PROBE)))
        return ({*self.tokenizer.all_special_tokens, "<image>", "<video>"} | added | marks | template) - {""}

    def note(self) -> str:
        """Which template is used."""
        named = "the processor's chat template" if self.has_template else (
            f"LLaVA-1.5's template ({self._llava(_PROBE.turns, asks=False)!r}), as the processor has none"
        )  # fmt: skip
        added = f", with {self.end} added behind every answer" if self.has_template and self.end else ""
        return f"conversations are written by {named}{added}"

    def question(self, sample: Sample) -> str:
        """The conversation up to where the model is to give the last answer."""
        return self._text(sample.turns, asks=True)

    def whole(self, sample: Sample) -> str:
        """The conversation with all its answers."""
        return self._text(sample.turns, asks=False)

    def tokens(self, text: str) -> list[int]:
        """Those of a text whose images and videos take one place each, or as many as their marks have."""
        return [int(token) for token in self._encoded(text)["input_ids"]]

    def adds_specials(self, text: str) -> bool:
        """Whether the tokenizer is to add its tokens around this text: not where the template wrote the first."""
        first = self.tokenizer.bos_token
        return not (first and text.startswith(first))

    def labels(self, samples: Sequence[Sample], ids: Tensor) -> Tensor:
        """``ids [batch, tokens]`` where they are of an answer or of the token that ends it, and −100 elsewhere.

        ``ids`` are the processor's, of ``whole``: images expanded to any number of tokens, padded on any side.
        An answer is looked for from the end, together with the words before it by which the model begins to speak.
        """
        labels = torch.full_like(ids, IGNORED)
        for row, sample in enumerate(samples):
            tokens = ids[row].tolist()
            end = len(tokens)
            for answer in reversed(self.answers(sample)):
                start = _last(tokens, answer.tokens, end)
                if start is None:
                    raise ConfigError(
                        f"load_workload: the processor must keep the tokens of answers, got others for {sample.place}"
                    )
                inside = slice(start + answer.skip, start + len(answer.tokens))
                labels[row, inside] = ids[row, inside]
                end = start
        return labels

    def answers(self, sample: Sample) -> list[_Answer]:
        """Where the answers of a conversation are, as tokens to look for."""
        text = self.whole(sample)
        encoded = self._encoded(text, return_offsets_mapping=True)
        ids, offsets = [int(token) for token in encoded["input_ids"]], encoded["offset_mapping"]
        answers = []
        for number in range(1, len(sample.turns) + 1):
            before, upto = (self._text(sample.turns[:number], asks=asks) for asks in (True, False))
            asked = self._text(sample.turns[:number], asks=None)
            if not (before.startswith(asked) and text.startswith(before) and text.startswith(upto)):
                raise ConfigError(
                    "load_workload: the chat template must write a longer conversation by adding to a shorter one, got "
                    f"another beginning for turn {number} of {sample.place}"
                )
            # A token counts from its last character: one may reach from the words before an answer into it.
            places = [place for place, (_, stop) in enumerate(offsets) if len(asked) < stop <= len(upto)]
            inside = [place for place in places if offsets[place][1] > len(before)]
            last = max((place for place in inside if ids[place] in self.ends), default=None)
            if last is None or inside[0] == last:
                raise ConfigError(
                    "load_workload: an answer must have tokens and end with one that ends it, got "
                    f"{sample.turns[number - 1].answer!r} in {sample.place}"
                )
            answers.append(_Answer(tuple(ids[places[0] : last + 1]), inside[0] - places[0]))
        return answers

    def _ends_answers(self) -> bool:
        """Whether a token that ends generation stands behind an answer."""
        before, whole = self.question(_PROBE), self.whole(_PROBE)
        return bool(self.ends & set(self.tokens(whole)[len(self.tokens(before)) :]))

    def _encoded(self, text: str, **options: Any) -> Any:
        return self.tokenizer(text, add_special_tokens=self.adds_specials(text), **options)

    def _text(self, turns: Sequence[Turn], *, asks: bool | None) -> str:
        """``asks``: without the last answer, but with the words by which the model begins it; None: without these."""
        if not self.has_template:
            return self._llava(turns, asks=asks)
        messages: list[dict[str, Any]] = []
        for turn in turns:
            content = [{"type": kind, **({"text": text} if kind == "text" else {})} for kind, text in turn.parts]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer + self.end}]})
        if asks is not False:
            del messages[-1]
        return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks is True))

    def _llava(self, turns: Sequence[Turn], *, asks: bool | None) -> str:
        text = ""
        for number, turn in enumerate(turns, 1):
            words = [said if kind == "text" else self._mark(kind) for kind, said in turn.parts]
            text += "USER: " + "\n".join(words)
            if number < len(turns) or asks is not None:
                text += " ASSISTANT:"
            if number < len(turns) or asks is False:
                text += f" {turn.answer}{self.end}"
        return text

    def _mark(self, kind: str) -> str:
        return str(getattr(self.processor, f"{kind}_token", None) or f"<{kind}>")


def _last(tokens: Sequence[int], sought: tuple[int, ...], end: int) -> int | None:
    """Where ``sought`` begins for the last time in ``tokens[:end]``."""
    for start in range(end - len(sought), -1, -1):
        if tokens[start] == sought[0] and tuple(tokens[start : start + len(sought)]) == sought:
            return start
    return None


_PROBE = Sample("", (Turn((("image", ""), ("text", "question")), "answer"),))
