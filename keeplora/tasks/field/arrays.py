"""Data sets that are arrays in few files: MNIST's IDX, and CIFAR100's pickles, of which nothing but data is taken."""

from __future__ import annotations

import codecs
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keeplora._untrusted import fault, read_bytes
from keeplora.methods.settings import ConfigError

from .images import ArrayImage
from .parts import Items, Parts

__all__ = ["read_cifar100", "read_mnist", "unpickle_arrays"]

_MOST = 2**30
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def read_mnist(folder: Path) -> Parts:
    """MNIST from its four IDX files; class names as torchvision has them."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    def part(name: str) -> Items:
        images = read_image_file(str(folder / f"{name}-images-idx3-ubyte")).numpy()
        labels = read_label_file(str(folder / f"{name}-labels-idx1-ubyte")).tolist()
        return _labelled(folder, images, labels, len(_DIGITS))

    return Parts(tuple(f"{n} - {word}" for n, word in enumerate(_DIGITS)), part("train"), part("t10k"))


def read_cifar100(folder: Path) -> Parts:
    """CIFAR100 from ``train``, ``test`` and ``meta``, with its fine labels."""
    classes = tuple(map(str, _entry(unpickle_arrays(folder / "meta"), "fine_label_names", folder / "meta")))

    def part(name: str) -> Items:
        table = unpickle_arrays(folder / name)
        data, labels = _entry(table, "data", folder / name), _entry(table, "fine_labels", folder / name)
        flat = data.array if isinstance(data, _Array) else np.empty(0, np.uint8)
        if flat.ndim != 2 or flat.shape[1] != 3072:
            raise ConfigError(
                f"read_images: {folder / name} must hold bytes [images, 3072], got {list(flat.shape)}. "
                "Unpack CIFAR100's Python version again"
            )
        return _labelled(folder, flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), list(labels), len(classes))

    return Parts(classes, part("train"), part("test"))


def _labelled(folder: Path, images: NDArray[np.uint8], labels: list[int], classes: int) -> Items:
    if len(images) != len(labels) or not all(0 <= label < classes for label in labels):
        raise ConfigError(
            f"read_images: {folder} must have a label below {classes} for each image, got {len(labels)} labels for "
            f"{len(images)} images, the largest {max(labels, default=-1)}. Unpack it again"
        )
    images = np.ascontiguousarray(images)
    return [(ArrayImage(images, i), int(label)) for i, label in enumerate(labels)]


def _entry(table: Any, key: str, path: Path) -> Any:
    for name in (key, key.encode()):  # of Python 2, read with either encoding
        if isinstance(table, dict) and name in table:
            return table[name]
    raise ConfigError(f"read_images: {path} must have {key!r}, got none. It must be CIFAR100's, not CIFAR10's")


def unpickle_arrays(path: Path) -> Any:
    """A pickle of lists, dicts, text, numbers and arrays of bytes, and of nothing else: no code in it is run.

    An array is in the ``array`` of what stands for it.

    Raises:
        ConfigError: the file cannot be read, is no pickle, or asks for anything else.
    """
    try:
        return _ArraysOnly(io.BytesIO(read_bytes(path, most=_MOST)), encoding="latin1").load()
    except (OSError, ValueError) as error:
        raise ConfigError(f"read_images: {path} must {fault(error)}") from None
    except Exception as error:  # unpickling what is none may raise anything
        raise ConfigError(f"read_images: {path} must be a pickle of arrays, got: {error}. Unpack it again") from None


class _ArraysOnly(pickle.Unpickler):
    """Gives stand-ins for what pickled arrays name: numpy's own classes believe whatever a pickle tells them."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case (("numpy.core.multiarray" | "numpy._core.multiarray"), "_reconstruct"):
                return lambda kind, shape, dtype: _Array()
            case (("numpy.core.numeric" | "numpy._core.numeric"), "_frombuffer"):
                return lambda raw, dtype, shape, order: _Array().filled(shape, dtype, order == "F", raw)
            case "numpy", "ndarray":
                return None  # told to _reconstruct, which needs no class
            case "numpy", "dtype":
                return _Dtype
            case "_codecs", "encode":  # how Python 3 writes bytes in old protocols
                return codecs.encode
        raise pickle.UnpicklingError(f"{module}.{name}, which is no array")


class _Dtype:
    def __init__(self, name: str, *rest: Any) -> None:
        if name not in ("u1", "|u1", "uint8", "B"):
            raise pickle.UnpicklingError(f"numbers of type {str(name)[:20]!r}, and not bytes")

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes have none of."""


class _Array:
    def __init__(self) -> None:
        self.array: NDArray[np.uint8] = np.empty(0, np.uint8)

    def filled(self, shape: tuple[int, ...], dtype: Any, fortran: bool, raw: bytes | str) -> _Array:
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a type")
        held = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)  # Python 2 had no bytes
        self.array = np.frombuffer(held, np.uint8).reshape(shape, order="F" if fortran else "C")
        return self

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.filled(shape, dtype, bool(fortran), raw)
