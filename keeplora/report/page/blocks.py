"""What a page is made of: parts with a heading, in them tables, charts, sentences, and what is folded away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from keeplora.report.style import contrast

__all__ = ["Block", "Cell", "Chart", "Folded", "Part", "Table", "Terms", "Text", "cells", "heat", "table"]


class Cell(NamedTuple):
    """A cell of a table; ``kind`` is its class, ``columns`` how many it is wide."""

    text: str
    kind: str = ""
    style: str = ""
    columns: int = 1


@dataclass(frozen=True)
class Table:
    """A table; the first cell of every row names it."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[Sequence[Cell]]
    rows: Sequence[Sequence[Cell]]
    style: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart as an ``<svg>`` element, and what it shows."""

    kind: ClassVar[str] = "chart"
    caption: str
    svg: str


@dataclass(frozen=True)
class Text:
    """A sentence; ``warning`` where it must not be missed."""

    kind: ClassVar[str] = "text"
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Terms:
    """Names and what they mean."""

    kind: ClassVar[str] = "terms"
    terms: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Folded:
    """Blocks behind a line that opens them."""

    kind: ClassVar[str] = "folded"
    title: str
    blocks: Sequence[Table | Chart | Text | Terms]
    open: bool = False


Block = Table | Chart | Text | Terms | Folded


@dataclass(frozen=True)
class Part:
    """A heading, what stands under it, and parts one level down."""

    name: str
    title: str
    blocks: Sequence[Block] = ()
    parts: Sequence[Part] = field(default_factory=tuple)


def cells(texts: Iterable[str]) -> list[Cell]:
    """Cells without a class."""
    return [Cell(text) for text in texts]


def table(caption: str, rows: Sequence[Sequence[str]], style: str = "") -> Table:
    """A table of plain texts; the first row are the titles."""
    return Table(caption, [cells(rows[0])], [cells(row) for row in rows[1:]], style)


_RAMP = ((247, 251, 255), (107, 174, 214), (8, 48, 107))


def heat(value: float, text: str, kind: str = "") -> Cell:
    """A cell coloured by ``value`` from 0 (white) to 100 (dark blue); its text is what contrasts more.

    >>> heat(0.0, "0").style, heat(100.0, "100").style
    ('background:#f7fbff;color:#000', 'background:#08306b;color:#fff')
    """
    place = 2 * min(max(value, 0.0), 100.0) / 100
    low = min(int(place), 1)
    mixed = (round(a + (place - low) * (b - a)) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
    colour = "#" + "".join(f"{part:02x}" for part in mixed)
    ink = "#000" if contrast(colour, "black") >= contrast(colour, "white") else "#fff"
    return Cell(text, kind, f"background:{colour};color:{ink}")
