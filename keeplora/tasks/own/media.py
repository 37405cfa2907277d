"""Images and videos of questions, as a model's processor takes them: resized already where it permits that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keeplora._untrusted import read_bytes
from keeplora.tasks.own.config import OwnTasks
from keeplora.tasks.own.contents import content
from keeplora.tasks.own.decoded import Decoded, Pixels, cache_folder, decode_all
from keeplora.tasks.own.instructions import Sample
from keeplora.tasks.own.pixels import check_image, rgb
from keeplora.tasks.own.videos import FRAMES, check_video, frames

__all__ = ["Loaded", "Media", "Pending"]

_STEPS = ("do_resize", "do_center_crop", "do_pad")
"""What of a processor makes pixels of another size."""
_PROBES = ((64, 48), (37, 90), (300, 200))


@dataclass(frozen=True)
class _File:
    """A file that is known by what it holds, wherever it lies and whatever it is called."""

    path: Path
    video: bool

    @property
    def name(self) -> str:
        return "video" if self.video else "image"

    @property
    def stamp(self) -> str:
        try:
            return content(self.path)
        except (OSError, ValueError):  # told as a fault where it is read
            return "missing"

    def read(self) -> bytes:
        return read_bytes(self.path)


class _Decoder:
    """Images in RGB, uint8 `[height, width, 3]`, and frames of videos, `[8, height, width, 3]`.

    Where it changes nothing that the model is given, images are what the processor itself resizes and crops them to;
    ``as_they_are`` are then its settings by which it takes them so.
    """

    def __init__(self, processor: Any) -> None:
        resizer: Any = getattr(processor, "image_processor", None)
        self._resizer = resizer
        on = {step: False for step in _STEPS if getattr(self._resizer, step, False)}
        self.as_they_are: dict[str, bool] = on if on and self._permitted(on) else {}
        how = resizer.to_json_string() if self.as_they_are else "as they are"
        self.settings = f"images {how}, {FRAMES} frames of videos"

    def check(self, item: _File, raw: bytes) -> list[tuple[str, str]]:
        return check_video(raw) if item.video else check_image(raw)

    def pixels(self, item: _File, raw: bytes) -> Pixels:
        if item.video:
            return frames(raw)
        image = rgb(raw)
        resized = self._resized(image) if self.as_they_are else None
        return np.asarray(image) if resized is None else resized

    def _resized(self, image: Any) -> Pixels | None:
        """What the processor makes of an image before it scales the pixels; None where that is no image of 8 bits."""
        made = self._resizer(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
        pixels = np.asarray(made["pixel_values"])
        if pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
            return None
        whole = np.clip(np.rint(pixels), 0, 255)
        return whole[0].transpose(1, 2, 0).astype(np.uint8) if np.array_equal(whole, pixels) else None

    def _permitted(self, on: Mapping[str, bool]) -> bool:
        """Whether the processor gives the same of images that it has resized, and of those it is given; by trial."""
        from PIL import Image

        draw = np.random.default_rng(0)
        for width, height in _PROBES:
            image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
            try:
                resized = self._resized(image)
                if resized is None:
                    return False
                one, other = (
                    self._resizer(images=[each], return_tensors="np", **steps)
                    for each, steps in ((image, {}), (Image.fromarray(resized), on))
                )
            except (AttributeError, KeyError, TypeError, ValueError):  # a processor of another kind
                return False
            if one.keys() != other.keys() or not all(np.array_equal(one[name], other[name]) for name in one):
                return False
        return True


class Media:
    """Images and videos of tasks, each decoded once for all runs as far as ``cache_gb`` goes.

    Args:
        processor: Of transformers; None: images are taken as they are.
    """

    def __init__(self, own: OwnTasks, processor: Any = None) -> None:
        self._data = own.data
        self._folder = cache_folder(own.data.cache and str(own.path(own.data.cache)))
        self._decoder = _Decoder(processor)
        self._places: dict[Path, tuple[Decoded, int]] = {}
        self._tasks: dict[str, Decoded] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """For the processor's call, with images that come from here."""
        return {"images_kwargs": dict(self._decoder.as_they_are)} if self._decoder.as_they_are else {}

    def look(self, task: str, paths: Mapping[Path, bool]) -> dict[Path, list[tuple[str, str]]]:
        """What is wrong with files (True: a video), as kinds and reasons; all are decoded, or were before."""
        items = [_File(path, video) for path, video in paths.items()]
        if not items:
            return {}
        room = max(0, int(1e9 * self._data.cache_gb) - self._kept)
        held = decode_all(
            items, self._decoder, folder=self._folder, room=room, readers=self._data.readers, title=task
        )  # fmt: skip
        self._tasks[task] = held
        self._places.update((path, (held, place)) for place, path in enumerate(paths))
        return {path: held.report.wrong.get(place, []) for place, path in enumerate(paths)}

    def pixels(self, path: Path, *, video: bool) -> Pixels:
        """Those of an image or of a video's frames."""
        if path in self._places:
            held, place = self._places[path]
            return np.array(held.one(place))  # libraries warn of arrays that cannot be written to
        item = _File(path, video)
        return self._decoder.pixels(item, item.read())

    def shape(self, path: Path, *, video: bool) -> tuple[int, ...]:
        """Of the pixels."""
        held, place = self._places.get(path, (None, 0))
        known = None if held is None else held.report.shapes[place]
        return known or self.pixels(path, video=video).shape

    def notes(self) -> list[str]:
        """Where decoded files are, and which are decoded again."""
        lines = []
        if self._kept:
            lines.append(f"decoded files: {self._kept / 1e9:.2g} GB in {self._folder}, which may be deleted")
        counts = {task: (held.report.again, len(held)) for task, held in self._tasks.items()}
        if again := ", ".join(f"{task} ({count} of {whole})" for task, (count, whole) in counts.items() if count):
            lines.append(f"decoded again in every pass, beyond cache_gb = {self._data.cache_gb:g}: {again}")
        return lines

    @property
    def _kept(self) -> int:
        return sum(held.report.kept for held in self._tasks.values())


@dataclass(frozen=True)
class Loaded:
    """Images and videos of some samples, a list for each."""

    images: list[list[Any]]
    videos: list[list[Any]]


class Pending:
    """Images and videos that are being read."""

    def __init__(self, samples: Sequence[Sample], media: Media, pool: ThreadPoolExecutor) -> None:
        self.images: list[list[Future[Any]]] = [
            [pool.submit(_image, media, path) for path in sample.images] for sample in samples
        ]
        self.videos: list[list[Future[Any]]] = [
            [pool.submit(media.pixels, path, video=True) for path in sample.videos] for sample in samples
        ]

    def loaded(self) -> Loaded:
        """All of them; waits until they are there."""
        images, videos = ([[one.result() for one in row] for row in kind] for kind in (self.images, self.videos))
        return Loaded(images, videos)


def _image(media: Media, path: Path) -> Any:
    from PIL import Image

    return Image.fromarray(media.pixels(path, video=False))
