"""Videos of a user's own tasks: eight frames of each, through PyAV."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keeplora._untrusted import read_bytes

__all__ = ["FRAMES", "check_video", "frames", "reads_videos"]

FRAMES = 8
"""Frames a model sees of a video, evenly spaced; of a shorter one some twice."""


def reads_videos() -> bool:
    """Whether PyAV is installed."""
    return find_spec("av") is not None


def check_video(source: Path | bytes) -> list[tuple[str, str]]:
    """Decode a video wholly, a file or its bytes; returns what is wrong with it: ``corrupt`` and why, or nothing.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        count = _count(source)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything
        return [("corrupt", f"{error or type(error).__name__}")]
    return [] if count else [("corrupt", "no frame")]


def frames(source: Path | bytes) -> NDArray[np.uint8]:
    """The frames ``floor(i · n / 8)`` of n, i = 0 … 7: ``uint8 [8, height, width, 3]`` in RGB."""
    count = _count(source)
    places = [i * count // FRAMES for i in range(FRAMES)]
    wanted: dict[int, NDArray[np.uint8]] = {}
    for place, frame in enumerate(_decoded(source)):
        if place in places:
            wanted[place] = frame.to_ndarray(format="rgb24")
    return np.stack([wanted[place] for place in places])


def _count(source: Path | bytes) -> int:
    """By decoding: what a container says of its length is often wrong, or left out."""
    return sum(1 for _ in _decoded(source))


def _decoded(source: Path | bytes) -> Iterator[Any]:
    import av  # optional

    raw = source if isinstance(source, bytes) else read_bytes(source)
    with av.open(io.BytesIO(raw), mode="r") as container:
        if not container.streams.video:
            raise ValueError("no video in it")
        yield from container.decode(video=0)
