"""Captions: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr, as UCIT scores Flickr30k and VizWiz.

BLEU, ROUGE-L and CIDEr are pycocoevalcap's, the library of the public scripts, so that the numbers are theirs; it is
old (2020) and complete. Its tokenizer and its METEOR are Java programs. Without Java the words come from NLTK's Penn
Treebank tokenizer and METEOR from NLTK; the result says so.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from keeplora.methods.settings import ConfigError

from .prediction import Score

__all__ = ["LONGEST", "WITHOUT_JAVA", "CaptionScore", "caption_score"]

LONGEST = 300
"""Characters of a text that are scored."""

Captions = dict[int, list[str]]

WITHOUT_JAVA = (
    "words by NLTK's Treebank tokenizer, not by Stanford's",
    "METEOR by NLTK with METEOR 1.5's weights, but exact and stem matches only (no synonyms, no paraphrases)",
)
_METEOR_1_5 = {"alpha": 0.85, "beta": 0.2, "gamma": 0.6}
"""Its weights for English; those of 2005 are NLTK's default and give scores nearly twice as high."""
_INSTALL = "Run pip install 'keeplora[instruct]'."


@dataclass(frozen=True)
class CaptionScore(Score):
    """The mean of the seven metrics, and each of them in ``parts``, times 100."""

    parts: Mapping[str, float] | None = None


def caption_score(
    texts: Mapping[str, str], references: Mapping[str, Sequence[str]], *, java: bool = False
) -> CaptionScore:
    """Score one caption for each image against its references; the mean of seven metrics, times 100.

    Args:
        texts: What the model wrote, by image. Cut to the first 300 characters.
        references: At least one right caption for each image, under the same names.
        java: Use the public score's own tokenizer and METEOR 1.5, which run in Java. Otherwise both are NLTK's, and
            ``notes`` of the result says so.

    Raises:
        ConfigError: the names are not the same, an image has no reference, or a package or Java is missing.

    Sources: Papineni et al. 2002 (BLEU); Banerjee and Lavie 2005 (METEOR); Lin 2004 (ROUGE-L); Vedantam et al. 2015
    (CIDEr, here CIDEr-D as in pycocoevalcap).
    """
    _check(texts, references, java)
    names = list(texts)
    told = {i: [_one_line(texts[name])[:LONGEST]] for i, name in enumerate(names)}
    right = {i: [_one_line(caption) for caption in references[name]] for i, name in enumerate(names)}
    told, right = (_stanford_words(each) if java else _treebank_words(each) for each in (told, right))
    parts = {**_cocoeval(told, right), "METEOR": _java_meteor(told, right) if java else _nltk_meteor(told, right)}
    parts = {
        name: 100.0 * parts[name] for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
    }
    notes = () if java else WITHOUT_JAVA
    if len(names) == 1:
        notes = (*notes, "CIDEr is 0 for a single image: it weighs words by how few images have them")
    return CaptionScore(sum(parts.values()) / len(parts), "mean of 7 caption metrics", len(names), notes, parts)


def _check(texts: Mapping[str, str], references: Mapping[str, Sequence[str]], java: bool) -> None:
    if not texts:
        raise ConfigError("caption_score: texts must hold at least one, got none. Generate for the test set first")
    odd = sorted(texts.keys() ^ references.keys())
    if odd:
        raise ConfigError(
            f"caption_score: texts and references must be of the same images, got {odd[0]!r} in one of them only "
            f"({len(odd)} in all). Score every image of the test set"
        )
    bare = [name for name, captions in references.items() if isinstance(captions, str) or not captions]
    if bare:
        raise ConfigError(
            f"caption_score: references must hold a list of captions for each image, got {references[bare[0]]!r} "
            f"for {bare[0]!r}"
        )
    for module in ("pycocoevalcap", *(() if java else ("nltk",))):
        if find_spec(module) is None:
            raise ConfigError(f"caption_score: {module} must be installed, got none. {_INSTALL}")
    if java and shutil.which("java") is None:
        raise ConfigError(
            "caption_score: java must be on PATH with java=True, got none. Install it, or leave java=False"
        )


def _one_line(caption: str) -> str:
    return " ".join(caption.split())


def _cocoeval(told: Captions, right: Captions) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu = Bleu(4).compute_score(right, told, verbose=0)[0]
    parts = {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, 1)}
    parts["ROUGE-L"] = float(Rouge().compute_score(right, told)[0])
    parts["CIDEr"] = float(Cider().compute_score(right, told)[0])
    return parts


def _treebank_words(captions: Captions) -> Captions:
    """Words as Stanford's tokenizer gives them, as far as Treebank's rules go: lower case, without punctuation."""
    from nltk.tokenize import NLTKWordTokenizer
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    split = NLTKWordTokenizer().tokenize
    left_out = {*PUNCTUATIONS, '"', "“", "”", "‘", "’", "–", "—", "…"}

    def words(caption: str) -> str:
        # The rules take the full stop off the end of a sentence only, so each is split by itself.
        sentences = re.split(r"(?<=[^.\s]{2}[.?!])\s+", caption)
        tokens = [token.lower() for sentence in sentences for token in split(sentence, convert_parentheses=True)]
        return " ".join(token for token in tokens if token not in left_out)

    return {i: [words(caption) for caption in each] for i, each in captions.items()}


def _nltk_meteor(told: Captions, right: Captions) -> float:
    from nltk.translate.meteor_score import meteor_score

    split = {i: [caption.split() for caption in each] for i, each in right.items()}
    scores = [meteor_score(split[i], told[i][0].split(), wordnet=_NoWordNet(), **_METEOR_1_5) for i in told]
    return float(sum(scores)) / len(scores)


class _NoWordNet:
    """Knows no synonym: NLTK would want WordNet's data, which it downloads."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _stanford_words(captions: Captions) -> Captions:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    asked = {i: [{"caption": caption} for caption in each] for i, each in captions.items()}
    words: Captions = PTBTokenizer().tokenize(asked)
    return words


def _java_meteor(told: Captions, right: Captions) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    return float(Meteor().compute_score(right, told)[0])
