"""Images of a user's own tasks: what is wrong with one, and its pixels as every model takes them."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from keeplora._untrusted import read_bytes

__all__ = ["check_image", "rgb"]

_GREY = ("1", "L", "LA", "La")
_DEEP = ("I", "F")
_STILL = ("MPO",)
"""Formats with several pictures in a file that are no animation: a phone's JPEG with its preview."""


def check_image(source: Path | bytes) -> list[tuple[str, str]]:
    """Decode an image wholly, a file or its bytes; returns what is wrong with it, as kind and reason.

    Nothing is wrong with an ordinary image.

    Kinds are those of `keeplora.tasks.own.FAULTS`: ``corrupt`` (then no other), ``depth``, ``grey``, ``alpha`` and
    ``animated``. Of several frames the first is decoded. An alpha channel that is opaque everywhere is no fault.

    Raises:
        FileNotFoundError: there is no such file.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "grey.png"
        ...     Image.new("L", (4, 4)).save(path)
        ...     check_image(path)
        [('grey', 'mode L')]
    """
    try:
        with _opened(source) as image:
            frames = 1 if image.format in _STILL else int(getattr(image, "n_frames", 1))
            image.seek(0)
            image.load()
            wrong = []
            if image.mode in _DEEP or image.mode.startswith("I;"):
                wrong.append(("depth", f"mode {image.mode}"))
            if image.mode in _GREY:
                wrong.append(("grey", f"mode {image.mode}"))
            if _is_transparent(image):
                wrong.append(("alpha", f"mode {image.mode}"))
            if frames > 1:
                wrong.append(("animated", f"{frames} frames"))
            return wrong
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # decoders of strange bytes raise anything: OSError, SyntaxError, struct.error …
        return [("corrupt", _reason(error))]


def rgb(source: Path | bytes) -> Image.Image:
    """The first frame, in RGB with 8 bits a channel: grey is repeated, alpha dropped; EXIF turns nothing.

    An image turned by its EXIF data stays as it lies in the file, as torchvision, open_clip and LLaVA read it.

    Raises:
        OSError, ValueError: it cannot be decoded; `check_image` tells why beforehand.
    """
    with _opened(source) as image:
        image.seek(0)
        if image.mode in ("P", "PA"):  # straight to RGB, Pillow warns of a palette with transparency
            return image.convert("RGBA").convert("RGB")
        return image.convert("RGB")


def _opened(source: Path | bytes) -> Image.Image:
    raw = source if isinstance(source, bytes) else read_bytes(source)
    if not raw:
        raise ValueError("an empty file")
    return Image.open(io.BytesIO(raw))


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return bool(lowest != 255)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "of no format that Pillow reads"
    return f"{error or type(error).__name__}"
