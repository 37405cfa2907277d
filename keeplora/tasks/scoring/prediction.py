"""What is scored, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keeplora.methods.settings import ConfigError

__all__ = ["Prediction", "Score", "mean_percent"]


@dataclass(frozen=True)
class Prediction:
    """What a model wrote for a question, and the right answer."""

    text: str
    answer: str
    question: str = ""
    image: str = ""
    """Path as the annotation has it: some rules go by the file's name."""


@dataclass(frozen=True)
class Score:
    """The score of a task.

    Examples:
        >>> print(Score(50.0, "exact match", 2, ("not the public score",)))
        50.00 (exact match, 2 answers; not the public score)
    """

    percent: float
    metric: str
    """The rule by its name: two scores compare only where it is the same."""
    count: int
    """Answers in the denominator."""
    notes: tuple[str, ...] = ()
    """What differs from the public score, for a reader of the result."""

    def __str__(self) -> str:
        return f"{self.percent:.2f} ({'; '.join((f'{self.metric}, {self.count} answers', *self.notes))})"


def mean_percent(function: str, predictions: Sequence[Prediction], share: Callable[[Prediction], float]) -> float:
    """100 times the mean of ``share``, which is 0 to 1, over every prediction."""
    if not predictions:
        raise ConfigError(f"{function}: predictions must hold at least one, got none. Generate for the test set first")
    return 100.0 * sum(map(share, predictions)) / len(predictions)
