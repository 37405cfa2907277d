"""Trials, the time each gets, and the table of what they lost."""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Tries = Iterator[str | None]
"""One entry per try: None, or what was lost."""


@dataclass(frozen=True)
class Trial:
    """One kind of mishap.

    ``tries(folder, random numbers)`` goes through it once, in a folder of its own, which is empty. A ``whole`` trial is
    never cut short, one that is not stops when its time is over. ``share`` is its part of the time.
    """

    name: str
    tries: Callable[[Path, random.Random], Tries]
    whole: bool = False
    share: float = 1.0


@dataclass
class Outcome:
    """What became of a trial."""

    name: str
    tries: int = 0
    losses: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run(
    trials: Sequence[Trial], seconds: float, seed: int, *, place: Path, tell: Callable[[str], None] = print
) -> list[Outcome]:
    """Give every trial its share of the time; each gets through at least one try, or one pass if it is whole.

    Where whole trials take more than theirs the others get less, but half of their shares at least.
    """
    outcomes, over, total = [], time.monotonic() + seconds, sum(trial.share for trial in trials)
    for i, trial in enumerate(trials):
        outcome = Outcome(trial.name)
        started = time.monotonic()
        left = (over - started) / sum(other.share for other in trials[i:])
        until = started + trial.share * max(left, 0.5 * seconds / total)
        numbers = random.Random(f"{seed} {trial.name}")
        while True:
            with tempfile.TemporaryDirectory(prefix="keeplora-", dir=place, ignore_cleanup_errors=True) as folder:
                for loss in trial.tries(Path(folder), numbers):
                    outcome.tries += 1
                    if loss is not None:
                        outcome.losses.append(loss)
                    if not trial.whole and time.monotonic() >= until:
                        break
            if time.monotonic() >= until:
                break
        outcome.seconds = time.monotonic() - started
        outcomes.append(outcome)
        tell(f"{trial.name}: {outcome.tries} tries, {len(outcome.losses)} lost, {outcome.seconds:.0f} s")
    return outcomes


def distinct(losses: Sequence[str]) -> list[str]:
    """Every loss once, the most frequent first, with how often it occurred.

    >>> distinct(["a", "b", "b"])
    ['2 x b', '1 x a']
    """
    return [f"{times} x {loss}" for loss, times in Counter(losses).most_common()]


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a table in Markdown.

    >>> print(table([Outcome("kills", 12, ["a"], 3.2)]))
    | what | tries | lost | seconds |
    |---|---:|---:|---:|
    | kills | 12 | 1 | 3 |
    | all | 12 | 1 | 3 |
    """
    everything = Outcome(
        "all",
        sum(outcome.tries for outcome in outcomes),
        [loss for outcome in outcomes for loss in outcome.losses],
        sum(outcome.seconds for outcome in outcomes),
    )
    lines = ["| what | tries | lost | seconds |", "|---|---:|---:|---:|"]
    lines += [f"| {o.name} | {o.tries} | {len(o.losses)} | {o.seconds:.0f} |" for o in (*outcomes, everything)]
    return "\n".join(lines)
