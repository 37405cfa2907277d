"""Exact match, the rule of UCIT's question answering."""

from __future__ import annotations

from collections.abc import Sequence

from .prediction import Prediction, Score, mean_percent

__all__ = ["exact_match", "exact_match_score"]


def exact_match(text: str, answer: str) -> bool:
    """Whether the two agree but for case, and for white space around ``text`` (not around ``answer``).

    Source: the evaluation of HiDe-LLaVA and MCITlib.

    Examples:
        >>> exact_match(" goldfish\\n", "Goldfish"), exact_match("a goldfish", "goldfish")
        (True, False)
    """
    return text.strip().upper() == answer.upper()


def exact_match_score(predictions: Sequence[Prediction]) -> Score:
    """The share of exact matches, in percent.

    Raises:
        ConfigError: there is no prediction.

    Examples:
        >>> print(exact_match_score([Prediction("A", "a"), Prediction("B", "a")]))
        50.00 (exact match, 2 answers)
    """
    percent = mean_percent("exact_match_score", predictions, lambda each: exact_match(each.text, each.answer))
    return Score(percent, "exact match", len(predictions))
