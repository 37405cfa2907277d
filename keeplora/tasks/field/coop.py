"""Data sets in CoOp's layout: ``split_zhou_*.json`` beside the images, and few-shot samples of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from keeplora._untrusted import fault, parse_json, read_bytes
from keeplora.methods.settings import ConfigError

from .arrays import read_cifar100, read_mnist
from .catalog import DataSet
from .parts import Items, Parts, files

__all__ = ["READERS", "few_shot", "read_split"]

_MOST = 2**28


def read_split(spec: DataSet, place: Path) -> Parts:
    """The parts that ``split_zhou_*.json`` tells: rows ``[path, label, class name]`` below train, val and test."""
    path = place / spec.split
    try:
        table = parse_json(read_bytes(path, most=_MOST))
    except (OSError, ValueError) as error:
        raise ConfigError(f"read_images: {path} must {fault(error)}") from None
    if not isinstance(table, dict) or not all(isinstance(table.get(part), list) for part in ("train", "val", "test")):
        raise ConfigError(f"read_images: {path} must have lists train, val and test. Take CoOp's file for {spec.name}")
    names: dict[int, str] = {}
    parts = {part: _part(path, place / spec.images, table[part], names) for part in ("train", "val", "test")}
    if sorted(names) != list(range(len(names))):
        raise ConfigError(
            f"read_images: {path} must number its classes from 0 without a gap, got {sorted(names)[:5]} …"
        )
    return Parts(tuple(names[label] for label in range(len(names))), parts["train"], parts["test"], parts["val"])


def _part(path: Path, images: Path, rows: list[Any], names: dict[int, str]) -> Items:
    paths, labels = [], []
    for row in rows:
        match row:
            case [str(file), int(label), str(name)] if names.setdefault(label, name) == name and _is_below(file):
                paths.append(images / file)
                labels.append(label)
            case _:
                raise ConfigError(
                    f"read_images: {path} must have rows of a path inside the folder, a label and its one name, "
                    f"got {str(row)[:120]}"
                )
    return files(paths, labels)


def _is_below(file: str) -> bool:
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in file


def few_shot(items: Items, shots: int, seed: int) -> Items:
    """``shots`` images of each class: without replacement, and with it where a class has fewer.

    Raises:
        ConfigError: ``shots`` is not at least 1.
    """
    if shots < 1:
        raise ConfigError(f"read_images: shots must be at least 1, or 0 for all images, got {shots}")
    by_class: dict[int, list[Any]] = defaultdict(list)
    for item in items:
        by_class[item[1]].append(item)
    draw = random.Random(seed)
    return [
        item
        for _, group in sorted(by_class.items())
        for item in (draw.sample(group, shots) if len(group) >= shots else draw.choices(group, k=shots))
    ]


def _aircraft(spec: DataSet, place: Path) -> Parts:
    """FGVC Aircraft has lists of its own: ``images_variant_*.txt``."""
    classes = tuple((place / "variants.txt").read_text(encoding="utf-8").splitlines())
    labels = {name.strip(): label for label, name in enumerate(classes)}

    def part(name: str) -> Items:
        lines = (place / f"images_variant_{name}.txt").read_text(encoding="utf-8").splitlines()
        rows = [line.strip().split(" ", 1) for line in lines if line.strip()]
        return files([place / "images" / f"{image}.jpg" for image, _ in rows], [labels[variant] for _, variant in rows])

    return Parts(tuple(labels), part("train"), part("test"), part("val"))


READERS: dict[str, Callable[[DataSet, Path], Parts]] = {
    "aircraft": _aircraft,
    "cifar100": lambda spec, place: read_cifar100(place),
    "mnist": lambda spec, place: read_mnist(place),
}
"""Of the data sets that have no ``split_zhou_*.json``."""
