"""Labelled images: where each is, opened when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ArrayImage", "FileImage", "ImageSet", "Source", "class_offsets", "split_paths"]


class Source(Protocol):
    """An image that is somewhere."""

    def open(self) -> Image:
        """The image in RGB."""


@dataclass(frozen=True)
class FileImage:
    """An image in a file of its own."""

    path: Path

    def open(self) -> Image:
        """Read the file."""
        from PIL import Image as images

        with images.open(self.path) as image:
            return image.convert("RGB")


@dataclass(frozen=True, eq=False)
class ArrayImage:
    """An image that lies with others in ``uint8 [images, height, width]`` or ``[images, height, width, 3]``."""

    array: NDArray[np.uint8]
    index: int

    def open(self) -> Image:
        """Copy it out of the array."""
        from PIL import Image as images

        return images.fromarray(self.array[self.index]).convert("RGB")


@dataclass(frozen=True)
class ImageSet:
    """The labelled images of a task.

    ``classes`` are names by label, as prompts have them. ``notes`` tell what a reader of the result should know: how it
    was split, and where its size is not the published one.
    """

    name: str
    classes: tuple[str, ...]
    template: str
    train: Sequence[tuple[Source, int]]
    test: Sequence[tuple[Source, int]]
    validation: Sequence[tuple[Source, int]] = ()
    templates: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def class_offsets(sets: Sequence[ImageSet]) -> tuple[int, ...]:
    """Where each data set's classes begin in the label space of all: label ``c`` of set ``k`` is ``offsets[k] + c``.

    Examples:
        >>> class_offsets([ImageSet("a", ("x", "y"), "{}", [], []), ImageSet("b", ("z",), "{}", [], [])])
        (0, 2)
    """
    ends = np.cumsum([0, *(len(each.classes) for each in sets)])
    return tuple(int(end) for end in ends[:-1])


def split_paths(images: ImageSet, root: str | Path) -> dict[str, Any]:
    """What to write beside a run so that its split can be had again: paths below ``root``, or indices, by part.

    Examples:
        >>> one = ImageSet("a", ("x",), "{}", [(FileImage(Path("/data/a/1.jpg")), 0)], [])
        >>> split_paths(one, "/data")
        {'name': 'a', 'train': ['a/1.jpg'], 'validation': [], 'test': []}
    """
    base = Path(root)

    def told(source: Source) -> Any:
        if isinstance(source, FileImage):
            return (source.path.relative_to(base) if source.path.is_relative_to(base) else source.path).as_posix()
        return source.index if isinstance(source, ArrayImage) else repr(source)

    parts = {"train": images.train, "validation": images.validation, "test": images.test}
    return {"name": images.name, **{part: [told(source) for source, _ in items] for part, items in parts.items()}}
