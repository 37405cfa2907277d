"""Pixels of images and videos: decoded once into a file that all runs map, or anew where that has no room."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from keeplora._files import WriteError, flush, staged, write_json
from keeplora._untrusted import MOST_JSON, parse_json, read_bytes
from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.config import FAULTS
from keeplora.tasks.own.images import ImageItem

__all__ = ["Decoded", "Decoder", "Pixels", "Report", "cache_folder", "decode_all"]

In = TypeVar("In")
Out = TypeVar("Out")
Pixels = NDArray[np.uint8]
Wrong = dict[int, list[tuple[str, str]]]
"""Kinds and reasons of what is wrong with items, by their place."""
_AT_A_TIME = 64
_FORM = 2
"""Of the files; another number makes them anew."""
_LEFT_OUT = ("missing", "corrupt", "depth")
"""Kinds of items that have no pixels."""


class Decoder(Protocol):
    """What makes pixels of the bytes of items."""

    @property
    def settings(self) -> str:
        """All that decides the pixels, as text."""

    def check(self, item: Any, raw: bytes) -> list[tuple[str, str]]:
        """What is wrong with an item, as kind and reason."""

    def pixels(self, item: Any, raw: bytes) -> Pixels:
        """Its pixels, uint8 of any shape."""


@dataclass
class Report:
    """What decoding has found out of items, by their place.

    ``wrong``: faults. ``hashes``: of the bytes. ``shapes``: of the pixels; None where there are none. ``starts``: where
    these are in the file, −1 where they are not. ``kept``: bytes of that file, of at most ``room``.
    """

    room: int
    wrong: Wrong = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)
    shapes: list[tuple[int, ...] | None] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    kept: int = 0

    @property
    def again(self) -> int:
        """How many are decoded again whenever they are read."""
        return sum(shape is not None and start < 0 for shape, start in zip(self.shapes, self.starts, strict=True))

    def serves(self, room: int) -> bool:
        """Whether another call with so much room would keep the same, or more than there is room for now."""
        return self.kept <= room and (not self.again or room <= self.room)


class Decoded:
    """The pixels of items, read by their places.

    Threads decode, not processes: runs are processes without children already, and Pillow works outside Python's lock.
    """

    def __init__(
        self, items: Sequence[ImageItem], decoder: Decoder, readers: int, report: Report, mapped: Pixels | None
    ) -> None:
        self._items, self._decoder, self._readers, self._mapped = items, decoder, readers, mapped
        self.report = report

    def __len__(self) -> int:
        return len(self._items)

    def one(self, place: int) -> Pixels:
        """The pixels of one item; those of the file are not to be written to."""
        start, shape = self.report.starts[place], self.report.shapes[place]
        if self._mapped is not None and start >= 0 and shape is not None:
            return self._mapped[start : start + int(np.prod(shape))].reshape(shape)
        item = self._items[place]
        return self._decoder.pixels(item, item.read())

    def __getitem__(self, places: Sequence[int]) -> Tensor:
        """The pixels of several items of one shape, `[n, …]`."""
        if self.report.again:
            return torch.from_numpy(np.stack(list(_threaded(self.one, places, self._readers))))
        return torch.from_numpy(np.stack([self.one(place) for place in places]))

    def batches(self, batches: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """The pixels of several batches; the next is read while one is used."""
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
    items: Sequence[ImageItem], decoder: Decoder, *, folder: Path, room: int, readers: int, title: str
) -> Decoded:
    """Decode every item once, find out what is wrong with any, and keep pixels in `folder` as far as `room` bytes go.

    A second call with the same items and decoder reads what the first one wrote.

    Raises:
        ConfigError: `folder` cannot be written to, or has no space left.
    """
    try:
        return _decode_all(items, decoder, folder=folder, room=room, readers=readers, title=title)
    except WriteError as error:
        raise ConfigError(
            f"open_workload: cache must be a folder with room for decoded images, got {folder}: {error} Set cache in "
            "[data] to another folder, or cache_gb = 0 to keep none"
        ) from error


def _decode_all(
    items: Sequence[ImageItem], decoder: Decoder, *, folder: Path, room: int, readers: int, title: str
) -> Decoded:
    key = _key(items, decoder)
    file, told = folder / f"{key}.pixels", folder / f"{key}.json"
    known = _known(told, len(items))
    if (
        known is not None
        and known.serves(room)
        and (not known.kept or (mapped := _mapped(file, known.kept)) is not None)
    ):
        return Decoded(items, decoder, readers, known, mapped if known.kept else None)
    made = Report(room)
    with staged(file) as temporary:
        with temporary.open("wb") as raw:
            seen = _threaded(lambda item: _look(item, decoder), items, readers)
            for place, one in enumerate(tqdm(seen, f"decoding {title}", len(items), leave=False, disable=None)):
                made.hashes.append(one.digest)
                if one.wrong:
                    made.wrong[place] = one.wrong
                made.shapes.append(None if one.pixels is None else one.pixels.shape)
                fits = one.pixels is not None and made.kept + one.pixels.nbytes <= room
                made.starts.append(made.kept if fits else -1)
                if one.pixels is not None and fits:
                    raw.write(np.ascontiguousarray(one.pixels).data)
                    made.kept += one.pixels.nbytes
        if made.kept:
            flush(temporary)
            os.replace(temporary, file)
    _write(told, made)
    return Decoded(items, decoder, readers, made, _mapped(file, made.kept) if made.kept else None)


@dataclass(frozen=True)
class _Seen:
    wrong: list[tuple[str, str]]
    digest: str
    pixels: Pixels | None = None


def _look(item: ImageItem, decoder: Decoder) -> _Seen:
    """One item, read and decoded; what cannot be read is one of its faults, never that of the file written to."""
    try:
        raw = item.read()
    except (FileNotFoundError, NotADirectoryError):
        return _Seen([("missing", "no such file")], "")
    except (OSError, ValueError) as error:
        return _Seen([("corrupt", getattr(error, "strerror", None) or str(error))], "")
    wrong, digest = decoder.check(item, raw), hashlib.blake2b(raw, digest_size=8).hexdigest()
    if any(kind in _LEFT_OUT for kind, _ in wrong):
        return _Seen(wrong, digest)
    return _Seen(wrong, digest, decoder.pixels(item, raw))


def _key(items: Sequence[ImageItem], decoder: Decoder) -> str:
    from PIL import __version__ as pillow

    digest = hashlib.sha256(f"{_FORM}\n{decoder.settings}\n{pillow}\n".encode())
    for item in items:
        digest.update(f"{type(item).__name__}\n{item.name}\n{item.stamp}\n".encode())
    return digest.hexdigest()[:32]


def _write(file: Path, report: Report) -> None:
    wrong = {str(place): [list(pair) for pair in kinds] for place, kinds in report.wrong.items()}
    write_json(file, {**vars(report), "wrong": wrong})


def _known(file: Path, items: int) -> Report | None:
    """What an earlier call wrote; None where it cannot be read or makes no sense: then it is made again."""
    try:
        held = parse_json(read_bytes(file, most=MOST_JSON))
        report = Report(
            int(held["room"]),
            {int(place): [(str(kind), str(why)) for kind, why in kinds] for place, kinds in held["wrong"].items()},
            [str(one) for one in held["hashes"]],
            [None if shape is None else tuple(map(int, shape)) for shape in held["shapes"]],
            [int(start) for start in held["starts"]],
            int(held["kept"]),
        )
        ends = [
            start + int(np.prod(shape or ()))
            for start, shape in zip(report.starts, report.shapes, strict=True)
            if start >= 0
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    sound = len(report.hashes) == len(report.shapes) == items and all(0 <= place < items for place in report.wrong)
    whole = max(ends, default=0) == report.kept
    known = all(kind in FAULTS for kinds in report.wrong.values() for kind, _ in kinds)
    return report if sound and whole and known else None


def _mapped(file: Path, size: int) -> Pixels | None:
    """The pixels in a file of that size; None where there are none."""
    try:
        return np.memmap(file, np.uint8, "r") if file.stat().st_size == size else None
    except (OSError, ValueError):
        return None


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
