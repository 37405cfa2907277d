"""Answers scored by a judge, as CL-VISTA's are; without one, by exact match."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from keeplora.methods.settings import ConfigError

from .exact import exact_match
from .prediction import Prediction, Score, mean_percent

__all__ = ["Judge", "judged_score"]

Judge = Callable[[str, str, str], float]
"""``judge(question, answer, text)`` is how right ``text`` is, from 0 to 5."""

_BEST = 5.0


def judged_score(predictions: Sequence[Prediction], judge: Judge | None = None, *, name: str = "") -> Score:
    """The judge's mean mark times 20, in percent; without a judge the share of exact matches, which needs no network.

    Args:
        judge: Marks one answer from 0 to 5. The public score's is Qwen3-30B-A3B, which you run yourself.
        name: The judge's, for the result. Two scores compare only where the judge is the same.

    Raises:
        ConfigError: there is no prediction, a judge without a name or the other way round, or a mark is not 0 to 5.

    Source: CL-VISTA, arXiv 2604.00677.

    Examples:
        >>> print(judged_score([Prediction("3", "3")], lambda question, answer, text: 4, name="strict"))
        80.00 (judge strict, 1 answers)
        >>> judged_score([Prediction("3", "3")]).metric
        'greedy exact match'
    """
    if (judge is None) != (not name):
        given = "a judge without a name" if judge else f"the name {name!r} without a judge"
        raise ConfigError(f"judged_score: judge and name must be given together, got {given}. Name the judge's model")
    if judge is None:
        percent = mean_percent("judged_score", predictions, lambda each: exact_match(each.text, each.answer))
        note = "CL-VISTA's public score is a judge model's mark; exact match is stricter and does not compare with it"
        return Score(percent, "greedy exact match", len(predictions), (note,))

    def share(each: Prediction) -> float:
        mark = judge(each.question, each.answer, each.text)
        if not (math.isfinite(mark) and 0 <= mark <= _BEST):
            raise ConfigError(f"judged_score: judge must give 0 to {_BEST:g}, got {mark!r} for {each.text[:80]!r}")
        return mark / _BEST

    return Score(mean_percent("judged_score", predictions, share), f"judge {name}", len(predictions))
