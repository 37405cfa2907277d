"""Pixels of images: decoded once into a file that all runs map, or decoded anew each time where that has no room."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from keeplora.tasks.own.config import FAULTS
from keeplora.tasks.own.images import ImageItem
from keeplora.tasks.own.pixels import check_image, rgb

__all__ = ["DecodedImages", "Report", "cache_folder", "decode_all"]

In = TypeVar("In")
Out = TypeVar("Out")
Wrong = dict[int, list[tuple[str, str]]]
"""Kinds and reasons of what is wrong with images, by their place."""
_AT_A_TIME = 64
_FORM = 1
"""Of the files; another number makes them anew."""
_LEFT_OUT = ("missing", "corrupt", "depth")
"""Kinds of images that have no pixels."""


class DecodedImages:
    """The images of a task as uint8 `[n, 3, height, width]`, read by their places.

    Threads decode, not processes: runs are processes without children already, and Pillow works outside Python's lock.
    """

    def __init__(
        self, items: Sequence[ImageItem], model: ComparingModel, readers: int, mapped: NDArray[np.uint8] | None
    ) -> None:
        self._items, self._model, self._readers, self._mapped = items, model, readers, mapped

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


@dataclass
class Report:
    """What decoding has found out: what is wrong with images, the hash of each one's bytes, and bytes that are kept."""

    wrong: Wrong
    hashes: list[str]
    kept: int


def decode_all(
    items: Sequence[ImageItem], model: ComparingModel, *, folder: Path, room: int, readers: int, title: str
) -> tuple[DecodedImages, Report]:
    """Decode every image once: what is wrong with any, and the pixels of all, kept in `folder` where `room` allows.

    A second call with the same files and model reads what the first one wrote.

    Raises:
        WriteError: `folder` cannot be written to, or has no space left.
    """
    key = _key(items, model)
    file, told = folder / f"{key}.npy", folder / f"{key}.json"
    known = _known(told, len(items))
    if known is not None and 0 < known.kept <= room and (mapped := _mapped(file, known.kept)) is not None:
        return DecodedImages(items, model, readers, mapped), known
    shape = _shape(items, model, known)
    length = len(items) * int(np.prod(shape))
    if length > room or not length:
        if known is None:
            known = Report({}, [], 0)
            for place, seen in enumerate(_looked(items, None, readers, f"checking {title}")):
                _note(known, place, seen)
        known.kept = 0
        _write(told, known)
        return DecodedImages(items, model, readers, None), known
    made = Report({}, [], 0)
    with staged(file) as temporary:
        with temporary.open("wb") as raw:
            head = {"descr": "|u1", "fortran_order": False, "shape": (len(items), *shape)}
            np.lib.format.write_array_header_1_0(raw, head)
            nothing = np.zeros(shape, np.uint8).tobytes()
            for place, seen in enumerate(_looked(items, model, readers, f"decoding {title}")):
                _note(made, place, seen)
                raw.write(nothing if seen.pixels is None else seen.pixels.contiguous().numpy().tobytes())
        flush(temporary)
        os.replace(temporary, file)
    made.kept = file.stat().st_size
    _write(told, made)
    return DecodedImages(items, model, readers, _mapped(file, made.kept)), made


@dataclass(frozen=True)
class _Seen:
    wrong: list[tuple[str, str]]
    digest: str
    pixels: Tensor | None = None


def _look(item: ImageItem, model: ComparingModel | None) -> _Seen:
    """One image, read and decoded; what cannot be read is one of its faults, never that of the file written to."""
    try:
        raw = item.read()
    except FileNotFoundError:
        return _Seen([("missing", "no such file")], "")
    except OSError as error:
        return _Seen([("corrupt", error.strerror or str(error))], "")
    wrong, digest = check_image(raw), hashlib.blake2b(raw, digest_size=8).hexdigest()
    if model is None or any(kind in _LEFT_OUT for kind, _ in wrong):
        return _Seen(wrong, digest)
    return _Seen(wrong, digest, model.pixels(rgb(raw)))


def _looked(items: Sequence[ImageItem], model: ComparingModel | None, readers: int, title: str) -> Iterator[_Seen]:
    seen = _threaded(lambda item: _look(item, model), items, readers)
    return iter(tqdm(seen, title, len(items), leave=False, disable=None, unit="image"))


def _note(report: Report, place: int, seen: _Seen) -> None:
    report.hashes.append(seen.digest)
    if seen.wrong:
        report.wrong[place] = seen.wrong


def _key(items: Sequence[ImageItem], model: ComparingModel) -> str:
    from PIL import __version__ as pillow

    digest = hashlib.sha256(f"{_FORM}\n{model.preprocessing}\n{pillow}\n".encode())
    for item in items:
        digest.update(f"{type(item).__name__}\n{item.name}\n{item.stamp}\n".encode())
    return digest.hexdigest()[:32]


def _write(file: Path, report: Report) -> None:
    wrong = {str(place): [list(pair) for pair in kinds] for place, kinds in report.wrong.items()}
    write_json(file, {"hashes": report.hashes, "bytes": report.kept, "wrong": wrong})


def _known(file: Path, images: int) -> Report | None:
    """What an earlier call wrote; None where it cannot be read or makes no sense: then it is made again."""
    try:
        held = parse_json(read_bytes(file, most=MOST_JSON))
        wrong = {int(place): [(str(kind), str(why)) for kind, why in kinds] for place, kinds in held["wrong"].items()}
        report = Report(wrong, [str(one) for one in held["hashes"]], int(held["bytes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    sound = len(report.hashes) == images and all(0 <= place < images for place in wrong)
    return report if sound and all(kind in FAULTS for kinds in wrong.values() for kind, _ in kinds) else None


def _mapped(file: Path, size: int) -> NDArray[np.uint8] | None:
    """The pixels in a file of that size; None where there are none."""
    try:
        held: NDArray[np.uint8] = np.load(file, mmap_mode="r")
        return held if held.dtype == np.uint8 and file.stat().st_size == size else None
    except (OSError, ValueError, EOFError):
        return None


def _shape(items: Sequence[ImageItem], model: ComparingModel, known: Report | None) -> tuple[int, ...]:
    """Of one image's pixels; all have the same, as preprocessing crops or squashes to a size."""
    for place, item in enumerate(items):
        if known is None or not any(kind in _LEFT_OUT for kind, _ in known.wrong.get(place, [])):
            pixels = _look(item, model).pixels
            if pixels is not None:
                return tuple(pixels.shape)
    return (0,)


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
