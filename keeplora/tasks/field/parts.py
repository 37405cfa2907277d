"""What a reader returns: the parts of a data set as it is on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .images import FileImage, Source

__all__ = ["Items", "Parts", "files"]

Items = Sequence[tuple[Source, int]]


@dataclass(frozen=True)
class Parts:
    """Labelled images by part, and the data set's own class names by label."""

    classes: tuple[str, ...]
    train: Items
    test: Items
    validation: Items = ()
    notes: tuple[str, ...] = ()


def files(paths: Iterable[str | Path], labels: Iterable[int]) -> Items:
    """Images in files with their labels."""
    return [(FileImage(Path(path)), int(label)) for path, label in zip(paths, labels, strict=True)]
