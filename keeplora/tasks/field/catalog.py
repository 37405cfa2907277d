"""The field's benchmarks as the files in ``data/`` tell them: orders, sizes, templates, class names, layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from keeplora._messages import suggest
from keeplora._untrusted import parse_toml
from keeplora.methods.settings import ConfigError

__all__ = [
    "BENCHMARKS",
    "DataSet",
    "ImageBenchmark",
    "InstructionBenchmark",
    "InstructionTask",
    "image_benchmark",
    "instruction_benchmark",
    "is_of_images",
]

_DATA = Path(__file__).parent / "data"

BENCHMARKS = tuple(sorted(path.stem for path in _DATA.glob("*.toml")))
"""Names of all that there are, of images and of instructions."""


@dataclass(frozen=True)
class DataSet:
    """One data set of an image benchmark, as it should be on disk."""

    name: str
    classes: int
    train: int
    test: int
    split: str
    """How training and test images are told apart; for CoOp's layout the file that tells it."""
    folders: tuple[str, ...]
    """Where it may be below the root; the first that is there is read."""
    needs: tuple[str, ...]
    """What must be in the folder."""
    template: str
    """The prompt of a class, with ``{}`` for its name."""
    validation: int = 0
    images: str = ""
    """The folder inside that the paths of ``split`` are relative to."""
    templates: tuple[str, ...] = ()
    """CLIP's prompts, whose normalised mean ZSCL and MoE-Adapters test with."""
    names: tuple[str, ...] = ()
    """Class names in the order of the labels, where not the data set's own are used."""
    class_format: str = "{}"
    """What the benchmark makes of a class name."""


@dataclass(frozen=True)
class ImageBenchmark:
    """A sequence of image data sets."""

    name: str
    layout: str
    """``torchvision`` or ``coop``."""
    source: str
    orders: Mapping[str, tuple[str, ...]]
    sets: Mapping[str, DataSet]
    one_label_space: bool = False
    """Whether the arg-max is over the classes of all data sets, and not over those of the task."""
    shots: int = 0
    """Training images of each class; 0 for all."""
    published: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """Transfer, Avg and Last in percent that others report for order I, by method."""

    def in_order(self, order: str = "I") -> tuple[DataSet, ...]:
        """The data sets in one of the published orders.

        Raises:
            ConfigError: there is no such order.

        Examples:
            >>> [each.name for each in image_benchmark("mtil").in_order("II")][:3]
            ['StanfordCars', 'Food', 'MNIST']
        """
        if order not in self.orders:
            raise ConfigError(f"{self.name}: order must be one of {', '.join(self.orders)}, got {order!r}")
        return tuple(self.sets[name] for name in self.orders[order])


@dataclass(frozen=True)
class InstructionTask:
    """One task of an instruction benchmark: its files inside one of ``folders``."""

    name: str
    folders: tuple[str, ...]
    train: str
    test: str
    scoring: str
    """``exact match``, ``captions``, ``MLLM-DCL <domain>`` or ``judge``: see `keeplora.tasks.scoring`."""
    captions: str = ""
    """The file of reference captions."""
    answers: str = ""
    """The file of answers, where they are not beside the questions."""


@dataclass(frozen=True)
class InstructionBenchmark:
    """A sequence of tasks of questions about images or videos."""

    name: str
    kind: str
    """``llava`` or ``video``."""
    source: str
    images: tuple[str, ...]
    """Folders that image and video paths may be relative to; "" is the task's own."""
    annotations: tuple[str, ...]
    """Folders that the tasks' folders may be in."""
    max_new_tokens: int
    tasks: tuple[InstructionTask, ...]
    """In order."""
    frames: int = 0
    """Of each video."""


def image_benchmark(name: str) -> ImageBenchmark:
    """``mtil``, ``mtil-coop`` or ``x-tail``.

    Raises:
        ConfigError: there is no such benchmark, or it is one of instructions.

    Examples:
        >>> mtil = image_benchmark("mtil")
        >>> sum(each.classes for each in mtil.in_order("I")), mtil.sets["DTD"].template
        (1201, 'a photo of a {} thing.')
    """
    table = _table("image_benchmark", name, "layout")
    sets = {each["name"]: _build(DataSet, each) for each in table.pop("sets")}
    orders = {order: tuple(names) for order, names in table.pop("orders").items()}
    published = {method: tuple(values) for method, values in table.pop("published", {}).items()}
    built: ImageBenchmark = _build(ImageBenchmark, {**table, "sets": sets, "orders": orders, "published": published})
    return built


def instruction_benchmark(name: str) -> InstructionBenchmark:
    """``ucit``, ``mllm-dcl`` or ``cl-vista``.

    Raises:
        ConfigError: there is no such benchmark, or it is one of images.

    Examples:
        >>> [task.name for task in instruction_benchmark("mllm-dcl").tasks]
        ['RS', 'Med', 'AD', 'Sci', 'Fin']
    """
    table = _table("instruction_benchmark", name, "kind")
    tasks = {each["name"]: _build(InstructionTask, each) for each in table.pop("tasks")}
    ordered = tuple(tasks[each] for each in table.pop("order"))
    built: InstructionBenchmark = _build(InstructionBenchmark, {**table, "tasks": ordered})
    return built


def is_of_images(name: str) -> bool:
    """Whether a benchmark is one of images and classes; else it is one of questions about images or videos.

    Examples:
        >>> is_of_images("x-tail"), is_of_images("ucit")
        (True, False)
    """
    return "layout" in parse_toml((_DATA / f"{name}.toml").read_bytes())


def _table(function: str, name: str, key: str) -> dict[str, Any]:
    tables = {each: parse_toml((_DATA / f"{each}.toml").read_bytes()) for each in BENCHMARKS}
    known = [each for each, table in tables.items() if key in table]
    if name not in known:
        raise ConfigError(f"{function}: name must be one of {', '.join(known)}, got {name!r}{suggest(name, known)}")
    return tables[name]


def _build(kind: Any, table: Mapping[str, Any]) -> Any:
    """The dataclass of a table: lists become tuples, and a key that it has not is an error of ours."""
    known = {each.name for each in fields(kind)}
    unknown = table.keys() - known
    assert not unknown, f"{kind.__name__} has no {unknown}"
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
