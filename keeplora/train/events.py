"""What a run tells about itself while it goes, and who listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One piece of news. ``kind``: resumed, task (starts), step, note, learned, done.

    ``task`` counts from 0; ``tasks`` is their number. Events are small and picklable: they cross processes.
    """

    kind: str
    label: str
    seed: int
    task: int
    tasks: int
    name: str = ""
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    text: str = ""
    certificate: str = ""
    capacity: str = ""


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listen to nothing."""
