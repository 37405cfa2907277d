"""The data sets of MTIL, by torchvision's readers, in torchvision's layouts.

torchvision has no public names for the lists of files of some classes; the private ones are used here alone, and the
tests read a small set of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import random_split

from .arrays import read_cifar100, read_mnist
from .catalog import DataSet
from .parts import Items, Parts, files

__all__ = ["READERS", "split_80_20"]

_SEED = 42


def split_80_20(items: Items) -> tuple[Items, Items]:
    """``random_split`` into ``int(0.8 n)`` and the rest, with a generator of seed 42: ZSCL's and KeepLoRA's rule."""
    sizes = [int(0.8 * len(items)), len(items) - int(0.8 * len(items))]
    parts: list[Any] = random_split(range(len(items)), sizes, torch.Generator().manual_seed(_SEED))  # type: ignore[arg-type]
    train, test = ([items[i] for i in part.indices] for part in parts)
    return train, test


def _listed(dataset: Any) -> Items:
    return files(dataset._image_files, dataset._labels)


def _aircraft(spec: DataSet, place: Path) -> Parts:
    from torchvision.datasets import FGVCAircraft

    train, test = (FGVCAircraft(place.parent, split, annotation_level="variant") for split in ("train", "test"))
    return Parts(tuple(train.classes), _listed(train), _listed(test))


def _caltech101(spec: DataSet, place: Path) -> Parts:
    from torchvision.datasets import Caltech101

    whole = Caltech101(place.parent)
    folder = place / "101_ObjectCategories"
    paths = [folder / whole.categories[y] / f"image_{n:04d}.jpg" for y, n in zip(whole.y, whole.index, strict=True)]
    train, test = split_80_20(files(paths, whole.y))
    return Parts(tuple(whole.categories), train, test, notes=(_drawn(spec),))


def _cifar100(spec: DataSet, place: Path) -> Parts:
    return read_cifar100(place)


def _dtd(spec: DataSet, place: Path) -> Parts:
    from torchvision.datasets import DTD

    train, test = (DTD(place.parent, split, partition=1) for split in ("train", "test"))
    return Parts(tuple(train.classes), _listed(train), _listed(test))


def _eurosat(spec: DataSet, place: Path) -> Parts:
    from torchvision.datasets import EuroSAT

    whole = EuroSAT(place.parent)
    train, test = split_80_20([item for path, label in whole.samples for item in files([path], [label])])
    return Parts(tuple(whole.classes), train, test, notes=(_drawn(spec),))


def _flowers(spec: DataSet, place: Path) -> Parts:
    from torchvision.datasets import Flowers102

    train, test = (Flowers102(place.parent, split) for split in ("train", "test"))
    return Parts(tuple(train.classes), _listed(train), _listed(test))


def _food(spec: DataSet, place: Path) -> Parts:
    from torchvision.datasets import Food101

    train, test = (Food101(place.parent, split) for split in ("train", "test"))
    return Parts(tuple(train.classes), _listed(train), _listed(test))


def _mnist(spec: DataSet, place: Path) -> Parts:
    return read_mnist(place / "raw")


def _oxford_pet(spec: DataSet, place: Path) -> Parts:
    from torchvision.datasets import OxfordIIITPet

    train, test = (OxfordIIITPet(place.parent, split) for split in ("trainval", "test"))
    return Parts(tuple(train.classes), files(train._images, train._labels), files(test._images, test._labels))


def _stanford_cars(spec: DataSet, place: Path) -> Parts:
    from torchvision.datasets import StanfordCars

    train, test = (StanfordCars(place.parent, split) for split in ("train", "test"))
    learned, tested = (files(*zip(*each._samples, strict=True)) for each in (train, test))
    return Parts(tuple(train.classes), learned, tested)


def _sun397(spec: DataSet, place: Path) -> Parts:
    from torchvision.datasets import SUN397

    whole = SUN397(place.parent)
    # torchvision walks the folders in the order of the file system, which would decide what seed 42 draws.
    train, test = split_80_20(sorted(_listed(whole), key=lambda item: item[0].path.relative_to(place).as_posix()))  # type: ignore[attr-defined]
    note = f"{_drawn(spec)}; the files are sorted first, where public code takes them as the file system lists them"
    return Parts(tuple(whole.classes), train, test, notes=(note,))


def _drawn(spec: DataSet) -> str:
    return f"{spec.name}: 80 % for training, drawn with seed {_SEED}"


READERS: dict[str, Callable[[DataSet, Path], Parts]] = {
    "Aircraft": _aircraft,
    "Caltech101": _caltech101,
    "CIFAR100": _cifar100,
    "DTD": _dtd,
    "EuroSAT": _eurosat,
    "Flowers": _flowers,
    "Food": _food,
    "MNIST": _mnist,
    "OxfordPet": _oxford_pet,
    "StanfordCars": _stanford_cars,
    "SUN397": _sun397,
}
