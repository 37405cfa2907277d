"""Reads image benchmarks from where they are: looks for everything first, then reads, then compares sizes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from keeplora._messages import listed
from keeplora.methods.settings import ConfigError

from . import coop, torchvision_sets
from .catalog import DataSet, ImageBenchmark, image_benchmark
from .images import FileImage, ImageSet, Source
from .parts import Parts

__all__ = ["read_image_set", "read_images"]

_READERS = {"torchvision": torchvision_sets.READERS, "coop": coop.READERS}


def read_images(
    root: str | Path, benchmark: str | ImageBenchmark, order: str = "I", *, shots: int | None = None, seed: int = 42
) -> tuple[ImageSet, ...]:
    """The data sets of an image benchmark below ``root``, in ``order``. Images are opened later, one by one.

    Args:
        benchmark: ``mtil``, ``mtil-coop``, ``x-tail``, or one from [`image_benchmark`][] that was changed.
        shots: Training images of each class, drawn with ``seed``; 0 for all. ``None`` for what the benchmark says.

    Raises:
        ConfigError: a data set is missing, half unpacked or of another version. All that is missing is named, with
            where it was looked for, before anything is read.
    """
    chosen = image_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
    specs = chosen.in_order(order)
    places = _places("read_images", chosen.name, Path(root), specs)
    count = chosen.shots if shots is None else shots
    return tuple(_read(chosen.layout, spec, place, count, seed) for spec, place in zip(specs, places, strict=True))


def read_image_set(
    root: str | Path, benchmark: str | ImageBenchmark, name: str, *, shots: int | None = None, seed: int = 42
) -> ImageSet:
    """One data set of an image benchmark: see [`read_images`][]."""
    chosen = image_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
    if name not in chosen.sets:
        raise ConfigError(f"read_image_set: name must be one of {', '.join(chosen.sets)}, got {name!r}")
    (place,) = _places("read_image_set", chosen.name, Path(root), [chosen.sets[name]])
    return _read(chosen.layout, chosen.sets[name], place, chosen.shots if shots is None else shots, seed)


def _places(function: str, benchmark: str, root: Path, specs: Sequence[DataSet]) -> list[Path]:
    """The folder of each data set; what is not there is told of all at once."""
    places, missing = [], []
    for spec in specs:
        there = [root / folder for folder in spec.folders if (root / folder).is_dir()]
        whole = [place for place in there if all((place / need).exists() for need in spec.needs)]
        places += whole[:1]
        if not there:
            missing.append(f"{spec.name}: no folder {' or '.join(spec.folders)}")
        elif not whole:
            lacking = [need for need in spec.needs if not (there[0] / need).exists()]
            missing.append(f"{spec.name}: {there[0].relative_to(root)} has no {listed(lacking)}")
    if missing:
        raise ConfigError(
            f"{function}: root must hold the data sets of {benchmark}, got {root} with {len(missing)} of "
            f"{len(specs)} missing. {'. '.join(missing)}. Unpack them there; nothing is downloaded"
        )
    return places


def _read(layout: str, spec: DataSet, place: Path, shots: int, seed: int) -> ImageSet:
    try:
        parts = _READERS[layout].get(spec.name, coop.read_split)(spec, place)
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(
            f"read_images: {error.name} must be installed to read {spec.name}, got none. "
            "Run pip install 'keeplora[fields]'"
        ) from error
    except Exception as error:  # of torchvision, scipy, PIL: whatever a broken file makes them say
        raise ConfigError(
            f"read_images: data set {spec.name} must be readable, got: {error!r} in {place}. "
            "Unpack it again, in the version the benchmark names"
        ) from error
    if len(parts.classes) != spec.classes:
        raise ConfigError(
            f"read_images: data set {spec.name} must have {spec.classes} classes, got {len(parts.classes)} in {place}. "
            "It is half unpacked or of another version"
        )
    _check_files(spec.name, (source for part in (parts.train, parts.validation, parts.test) for source, _ in part))
    notes = [*parts.notes, *_sizes(spec, parts)]
    train = parts.train
    if shots:
        train = coop.few_shot(train, shots, seed)
        notes.append(
            f"{spec.name}: {shots} training images of each class, drawn with seed {seed}; no list is published"
        )
    names = tuple(name.replace("_", " ") for name in (spec.names or parts.classes))
    return ImageSet(
        spec.name,
        tuple(spec.class_format.format(name) for name in names),
        spec.template,
        train,
        parts.test,
        parts.validation,
        spec.templates or (spec.template,),
        tuple(notes),
    )


def _sizes(spec: DataSet, parts: Parts) -> Iterable[str]:
    wanted = {"training": spec.train, "validation": spec.validation, "test": spec.test}
    got = {"training": parts.train, "validation": parts.validation, "test": parts.test}
    for part, size in wanted.items():
        if len(got[part]) != size:
            found = len(got[part])
            yield f"{spec.name}: {found} {part} images, not the published {size}; its accuracy compares with none"


def _check_files(name: str, sources: Iterable[Source]) -> None:
    """Every file that is listed is there: one look into each folder, not one for each file."""
    folders: dict[Path, set[str]] = defaultdict(set)
    for source in sources:
        if isinstance(source, FileImage):
            folders[source.path.parent].add(source.path.name)
    absent = []
    for folder, wanted in sorted(folders.items()):
        there = set(os.listdir(folder)) if folder.is_dir() else set()
        absent += [folder / file for file in sorted(wanted - there)]
    if absent:
        raise ConfigError(
            f"read_images: data set {name} must have all its images, got none at {absent[0]} "
            f"({len(absent)} of {sum(map(len, folders.values()))} missing). It is half unpacked: unpack it again"
        )
