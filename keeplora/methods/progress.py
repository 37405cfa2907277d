"""How far a method's passes are: bars on stderr that vanish when done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from keeplora._messages import add_note
from keeplora.distributed import processes
from keeplora.lora import LoraSlot
from keeplora.math.batch import same_kind

__all__ = ["for_all_layers", "progress"]

T = TypeVar("T")
PATIENCE = 0.5  # seconds before a bar appears: what is done sooner needs none


@contextmanager
def progress(items: Iterable[T], phase: str, unit: str, *, shown: bool | None) -> Iterator[Iterable[T]]:
    """``items``, counted while they are taken; the remaining time is told where they have a length.

    Args:
        shown: True or False; None shows the bar if stderr is a terminal, of several processes in the first.
    """
    with _bar(phase, unit, shown, items) as bar:
        yield bar


def for_all_layers(
    slots: Sequence[LoraSlot],
    compute: Callable[[list[int]], Iterable[T]],
    phase: str,
    *,
    shown: bool | None,
    together: Iterable[list[int]] | None = None,
) -> list[T]:
    """``compute`` for every slot: given the positions of slots that are best worked on together, their results.

    Which are: those of ``together``, by default those of one shape on one device. An error is noted with the layers it
    arose in.
    """
    weights = [slot.weight for slot in slots]
    groups = same_kind([(w.shape, w.dtype, w.device) for w in weights], weights) if together is None else together
    results: dict[int, T] = {}
    with _bar(phase, "layer", shown, None, len(slots)) as bar:
        for group in groups:
            try:
                results.update(zip(group, compute(group), strict=True))
            except Exception as error:
                add_note(error, f"in {', '.join(slots[i].name for i in group)}")
                raise
            bar.update(len(group))
    return [results[i] for i in range(len(slots))]


def _bar(phase: str, unit: str, shown: bool | None, items: Iterable[Any] | None, total: int | None = None) -> tqdm[Any]:
    if shown is None and processes().rank > 0:
        shown = False  # one bar is enough
    return tqdm(
        items, desc=phase, unit=unit, total=total, leave=False, dynamic_ncols=True,
        disable=None if shown is None else not shown, delay=0 if shown else PATIENCE,
    )  # fmt: skip
