"""Word-level tokenizer of the embedded model, spelling out the words it does not know."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from keeplora._files import write_atomic

PAD, START = "<pad>", "<start>"
END = "<end>"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


class Tokenizer:
    """Map texts to token ids [texts, context] int64: start, words (or characters), end, padding.

    The end token has the highest id of the vocabulary, because open_clip's text tower reads its feature where the
    token id is largest.

    Args:
        words: the vocabulary in order of id; it starts with the padding and start tokens and ends with the end token.
        context: number of positions; longer texts are cut, the end token always stays.

    Examples:
        >>> tokenizer = Tokenizer.from_texts(["red heart", "red circle"], context=6, least=2)
        >>> tokenizer(["Red heart!", "red"]).shape
        torch.Size([2, 6])
        >>> tokenizer.decode(tokenizer(["red sun"])[0])
        'red s u n'
    """

    def __init__(self, words: Sequence[str], context: int) -> None:
        if len(set(words)) != len(words) or tuple(words[:2]) != (PAD, START) or words[-1] != END:
            raise ValueError(
                "Tokenizer: words must be distinct, start with the padding and start tokens and end with the end "
                f"token, got {list(words[:2])} … {list(words[-1:])}. Build it with Tokenizer.from_texts."
            )
        if context < 3:
            raise ValueError(f"Tokenizer: context must be at least 3, got {context}.")
        self.words = tuple(words)
        self.context = context
        self._ids = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, context: int, least: int) -> Tokenizer:
        """A vocabulary of all characters and of the words that occur in at least `least` of the texts."""
        counts = Counter(word for text in texts for word in set(split(text)))
        common = sorted(w for w, n in counts.items() if n >= least and len(w) > 1)
        return cls([PAD, START, *CHARACTERS, *common, END], context)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read what `save` wrote."""
        stored = json.loads(path.read_text(encoding="utf8"))
        return cls(stored["words"], stored["context"])

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        text = json.dumps({"context": self.context, "words": self.words})
        write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf8"))

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if isinstance(texts, str):
            raise TypeError(f"Tokenizer: texts must be a sequence of strings, got {texts[:40]!r}. Put it in a list.")
        rows = torch.zeros(len(texts), self.context, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self._ids[START]]
            for word in split(text):
                ids += [self._ids[word]] if word in self._ids else [self._ids[ch] for ch in word]
            ids = [*ids[: self.context - 1], self._ids[END]]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def decode(self, ids: Tensor) -> str:
        """The words of one row of ids, without start, end and padding."""
        return " ".join(self.words[i] for i in ids.tolist() if self.words[i] not in (PAD, START, END))


def split(text: str) -> list[str]:
    """Lower case words of letters and digits."""
    return re.findall(r"[a-z0-9]+", text.lower())
