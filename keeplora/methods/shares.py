"""Which share of a task lay in free space when it began: what ``capacity`` forecasts from, of every method."""

from __future__ import annotations

from typing import NamedTuple

from .reading import is_shares
from .state import State, StateError

__all__ = ["UNKNOWN", "Shares", "recalled_shares"]


class Shares(NamedTuple):
    """Of a layer: the share of the last task's energy that lay in free space when it began, and of the open task's.

    It is the energy of the gradient, or of the inputs where a method looks at no gradient. None where nobody looked, or
    there was none.
    """

    last: float | None = None
    opening: float | None = None

    def opened(self, share: float | None) -> Shares:
        """A task has begun."""
        return Shares(self.last, share)

    def closed(self) -> Shares:
        """It was learned."""
        return Shares(self.opening)

    def dropped(self) -> Shares:
        """It was not."""
        return Shares(self.last)


UNKNOWN = Shares()


def recalled_shares(state: State, count: int) -> list[Shares]:
    """Those of ``count`` layers in a state, under ``free_shares``; ``StateError`` where they are none."""
    rows = state.meta.get("free_shares")
    if not is_shares(rows, count, 2):
        raise StateError(
            f"load_state: free_shares must have two numbers in [0, 1], or null, for each of {count} targets, got "
            f"{rows!r}"
        )
    return [Shares(*row) for row in rows]
