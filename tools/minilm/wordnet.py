"""WordNet's synsets from the files of the Debian package wordnet-base."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
Key = tuple[str, str]


@dataclass(frozen=True)
class Synset:
    """One meaning: its words, its definition without examples, and what it points to."""

    key: Key
    file: int
    """Number of the lexicographer file (lexnames(5WN)): 5 is noun.animal, 38 verb.motion."""
    words: tuple[str, ...]
    gloss: str
    above: tuple[Key, ...]
    topics: tuple[Key, ...]


class WordNet:
    """All synsets, found by lexicographer file, by a word above them, or by topic."""

    def __init__(self, folder: Path) -> None:
        self.synsets: dict[Key, Synset] = {}
        for part, letter in PARTS.items():
            for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
                if not line.startswith("  "):  # the licence
                    found = _parse(line, letter)
                    self.synsets[found.key] = found

    @cached_property
    def below(self) -> dict[Key, list[Key]]:
        """Direct hyponyms."""
        found = defaultdict(list)
        for synset in self.synsets.values():
            for key in synset.above:
                found[key].append(synset.key)
        return found

    def in_file(self, number: int) -> set[Key]:
        return {key for key, synset in self.synsets.items() if synset.file == number}

    def of_topic(self, word: str) -> set[Key]:
        """Synsets that WordNet files under the topic whose first word is this one."""
        return {
            key
            for key, synset in self.synsets.items()
            if any(self.synsets[topic].words[0] == word for topic in synset.topics)
        }

    def under(self, word: str, file: int) -> set[Key]:
        """Everything below the sense of a noun with the most below it, in one lexicographer file."""
        senses = [s.key for s in self.synsets.values() if word in s.words and s.key[0] == "n" and s.file == file]
        if not senses:
            raise ValueError(f"under: word must be a noun of file {file}, got {word!r}")
        return max((set(self._descendants(key)) for key in senses), key=len) & self.in_file(file)

    def _descendants(self, key: Key) -> Iterable[Key]:
        seen, waiting = set(), [key]
        while waiting:
            for child in self.below[waiting.pop()]:
                if child not in seen:
                    seen.add(child)
                    waiting.append(child)
        return seen


def _parse(line: str, letter: str) -> Synset:
    """One line of a data file, see wndb(5WN)."""
    head, _, text = line.partition(" | ")
    fields = head.split()
    count = int(fields[3], 16)
    words = tuple(fields[4 + 2 * i].replace("_", " ") for i in range(count))
    start = 5 + 2 * count
    pointers = [fields[start + 4 * i : start + 4 * i + 3] for i in range(int(fields[start - 1]))]
    above = tuple((part, offset) for symbol, offset, part in pointers if symbol in ("@", "@i"))
    topics = tuple((part, offset) for symbol, offset, part in pointers if symbol == ";c")
    gloss = re.split(r';\s*"', text.strip())[0].strip().strip('"')
    return Synset((letter, fields[0]), int(fields[1]), words, gloss, above, topics)
