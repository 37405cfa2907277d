"""A quick look at image files: their headers alone, of every k-th file where there are many."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from keeplora.tasks.own.faults import Fault

__all__ = ["MOST", "header_faults", "look_at_headers"]

MOST = 20_000
"""Files that are opened; of more, every k-th is. A local disk gives some thousand headers a second."""
_GREY = ("1", "L", "LA", "La")
_DEEP = ("I", "F")
_STILL = ("MPO",)
"""Formats with several pictures in a file that are no animation: a phone's JPEG with its preview."""


def look_at_headers(pictures: Sequence[tuple[str, str]], most: int = MOST) -> tuple[list[Fault], int]:
    """Faults of image files, each given as task and path, and how many files were opened.

    Raises:
        ImportError: Pillow is not installed.
    """
    step = max(1, -(-len(pictures) // most))
    chosen = pictures[::step]
    faults = [Fault(kind, task, path, why) for task, path in chosen for kind, why in header_faults(path)]
    return faults, len(chosen)


def header_faults(path: str) -> list[tuple[str, str]]:
    """What is wrong with an image as far as its header tells: kind and reason, nothing for an ordinary one.

    An alpha channel is named even where it turns out opaque. Files that end too early are not noticed: no pixel is
    decoded.

    >>> header_faults("gone.png")
    [('corrupt', 'no file that can be read')]
    """
    from PIL import Image, UnidentifiedImageError  # optional

    if not os.path.isfile(path):  # a pipe would be waited for
        return [("corrupt", "no file that can be read")]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large is no fault
            image = Image.open(path)
        with image:
            wrong = []
            if image.mode in _DEEP or image.mode.startswith("I;"):
                wrong.append(("depth", f"mode {image.mode}"))
            if image.mode in _GREY:
                wrong.append(("grey", f"mode {image.mode}"))
            if image.has_transparency_data:
                wrong.append(("alpha", f"mode {image.mode}"))
            if image.format not in _STILL and getattr(image, "is_animated", False):
                wrong.append(("animated", "several frames"))
            return wrong
    except MemoryError:
        raise
    except Exception as error:  # decoders of strange bytes raise anything: OSError, SyntaxError, struct.error …
        if isinstance(error, UnidentifiedImageError):
            return [("corrupt", "of no format that Pillow reads")]
        return [("corrupt", f"{getattr(error, 'strerror', None) or error or type(error).__name__}")]
