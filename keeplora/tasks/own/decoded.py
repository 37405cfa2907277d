"""Pixels of images: decoded once into a file that all runs map, or decoded anew each time where that has no room."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from keeplora._files import flush, staged, write_json
from keeplora._untrusted import MOST_JSON, parse_json, read_bytes
from keeplora.tasks.own.comparing import ComparingModel
from keeplora.tasks.own.images import ImageItem
from keeplora.tasks.own.pixels import check_image, rgb

__all__ = ["DecodedImages", "cache_folder", "decode_all"]

In = TypeVar("In")
Out = TypeVar("Out")
Wrong = dict[int, list[tuple[str, str]]]
"""Kinds and reasons of what is wrong with images, by their place."""
_AT_A_TIME = 64
_LEFT_OUT = ("corrupt", "depth")
"""Kinds of images that have no pixels."""


class DecodedImages:
    """The images of a task as uint8 `[n, 3, height, width]`, read by their places.

    Threads decode, not processes: runs are processes without children already, and Pillow works outside Python's lock.
    """

    def __init__(self, items: Sequence[ImageItem], model: ComparingModel, readers: int, file: Path | None) -> None:
        self._items, self._model, self._readers = items, model, readers
        self._mapped: NDArray[np.uint8] | None = None if file is None else np.load(file, mmap_mode="r")

    @property
    def kept(self) -> bool:
        """Whether they are decoded already."""
        return self._mapped is not None

    def __getitem__(self, places: Sequence[int]) -> Tensor:
        if self._mapped is not None:
            return torch.from_numpy(self._mapped[list(places)])
        chosen = (self._items[place] for place in places)
        return torch.stack(list(_threaded(lambda item: self._model.pixels(rgb(item.read())), chosen, self._readers)))

    def batches(self, batches: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """The images of several batches; the next is read while one is used."""
        with ThreadPoolExecutor(1) as ahead:
            waiting = None
            for places in batches:
                coming = ahead.submit(self.__getitem__, places)
                if waiting is not None:
                    yield waiting.result()
                waiting = coming
            if waiting is not None:
                yield waiting.result()


def cache_folder(setting: str) -> Path:
    """Where decoded images are kept: the setting, or ``keeplora`` in the user's folder for caches."""
    if setting:
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keeplora"


def decode_all(
    items: Sequence[ImageItem], model: ComparingModel, *, folder: Path, room: int, readers: int, title: str
) -> tuple[DecodedImages, Wrong, int]:
    """Decode every image once: what is wrong with any, and the pixels of all, kept in `folder` where `room` allows.

    A second call with the same files and model reads what the first one wrote.

    Returns:
        The images; kinds and reasons of what is wrong, by place; bytes that are kept.

    Raises:
        WriteError: `folder` cannot be written to.
    """
    key = _key(items, model)
    report, file = folder / f"{key}.json", folder / f"{key}.npy"
    known = _known(report, len(items))
    if known is not None and (size := known[1]) <= room and size and file.is_file() and file.stat().st_size == size:
        return DecodedImages(items, model, readers, file), known[0], size
    first = None if known is None else known[0]
    wrong: Wrong = {} if first is None else first
    shape = _shape(items, model, wrong)
    length = len(items) * int(np.prod(shape))
    if length > room or not length:
        if first is None:
            for place, kinds in enumerate(_checked(items, readers, title)):
                if kinds:
                    wrong[place] = kinds
            write_json(report, {"images": len(items), "bytes": 0, "wrong": _plain(wrong)})
        return DecodedImages(items, model, readers, None), wrong, 0
    with staged(file) as temporary:
        array = np.lib.format.open_memmap(temporary, "w+", dtype=np.uint8, shape=(len(items), *shape))
        for place, (kinds, pixels) in enumerate(_pixels(items, model, readers, title)):
            if kinds:
                wrong[place] = kinds
            if pixels is not None:
                array[place] = pixels.numpy()
        array.flush()
        del array
        flush(temporary)
        os.replace(temporary, file)
    size = file.stat().st_size
    write_json(report, {"images": len(items), "bytes": size, "wrong": _plain(wrong)})
    return DecodedImages(items, model, readers, file), wrong, size


def _key(items: Sequence[ImageItem], model: ComparingModel) -> str:
    from PIL import __version__ as pillow

    digest = hashlib.sha256(f"{model.preprocessing}\n{pillow}\n".encode())
    for item in items:
        digest.update(f"{type(item).__name__}\n{item.name}\n{item.stamp}\n{_changed(item)}\n".encode())
    return digest.hexdigest()[:32]


def _changed(item: ImageItem) -> int:
    """When a file was written last: a cache may be made anew too often, never too rarely."""
    root = getattr(item, "root", None)
    path = None if root is None else root / item.name
    return path.stat().st_mtime_ns if path is not None and path.is_file() else 0


def _known(report: Path, images: int) -> tuple[Wrong, int] | None:
    try:
        held = parse_json(read_bytes(report, most=MOST_JSON))
        wrong = {int(place): [(str(kind), str(why)) for kind, why in kinds] for place, kinds in held["wrong"].items()}
        return (wrong, int(held["bytes"])) if held["images"] == images else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a cache that cannot be read is made again


def _shape(items: Sequence[ImageItem], model: ComparingModel, wrong: Wrong) -> tuple[int, ...]:
    """Of one image's pixels; all have the same, as preprocessing crops or squashes to a size."""
    for place, item in enumerate(items):
        if not any(kind in _LEFT_OUT for kind, _ in wrong.get(place, [])):
            raw = item.read()
            if not any(kind in _LEFT_OUT for kind, _ in check_image(raw)):
                return tuple(model.pixels(rgb(raw)).shape)
    return (0,)


def _checked(items: Sequence[ImageItem], readers: int, title: str) -> Iterator[list[tuple[str, str]]]:
    return _shown(_threaded(lambda item: check_image(item.read()), items, readers), len(items), f"checking {title}")


def _pixels(
    items: Sequence[ImageItem], model: ComparingModel, readers: int, title: str
) -> Iterator[tuple[list[tuple[str, str]], Tensor | None]]:
    def one(item: ImageItem) -> tuple[list[tuple[str, str]], Tensor | None]:
        raw = item.read()
        kinds = check_image(raw)
        return kinds, None if any(kind in _LEFT_OUT for kind, _ in kinds) else model.pixels(rgb(raw))

    return _shown(_threaded(one, items, readers), len(items), f"decoding {title}")


def _threaded(work: Callable[[In], Out], items: Iterable[In], readers: int) -> Iterator[Out]:
    """Results in order, few at a time, so that memory stays small."""
    with ThreadPoolExecutor(readers) as pool:
        chunk: list[In] = []
        for item in items:
            chunk.append(item)
            if len(chunk) == _AT_A_TIME:
                yield from pool.map(work, chunk)
                chunk = []
        yield from pool.map(work, chunk)


def _shown(results: Iterator[Out], total: int, title: str) -> Iterator[Out]:
    return iter(tqdm(results, title, total, leave=False, disable=None, unit="image"))


def _plain(wrong: Wrong) -> dict[str, list[list[str]]]:
    return {str(place): [list(pair) for pair in kinds] for place, kinds in wrong.items()}
