"""The settings of a run: read from TOML, validated with clear errors, written into the run folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from typing import Any

import torch

from keeplora._calls import named
from keeplora._messages import suggest
from keeplora._untrusted import MOST_JSON, fault, parse_toml, parse_yaml, read_bytes
from keeplora.methods.settings import ConfigError, Settings
from keeplora.tasks.field.catalog import BENCHMARKS
from keeplora.tasks.own.config import OwnTasks, parse_own, restored_own
from keeplora.train.config_checks import BOTH, validate
from keeplora.train.plain import check_plain
from keeplora.train.plugins import join_plugins
from keeplora.train.siblings import sibling

ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class MethodConfig(Settings):
    """One column of the result table: a method, its learning rate and its own settings.

    ``method`` is the registered name (``keeplora.methods.METHODS``). It defaults to the label, the key
    under which this entry stands in ``RunConfig.method``, so that one method can appear several times
    under different labels.
    """

    method: str
    learning_rate: float = 1e-3
    weight_decay: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig(Settings):
    """Everything that decides the numbers of a run, and where they go.

    Exactly one of ``epochs`` and ``steps`` is given, as a number, or as a list with one for each task.
    ``rate_factors`` multiply every method's learning rate in each task. ``schedule`` is PyTorch's one-cycle, or half a
    cosine after a linear ``warmup``, the share of steps it takes. ``switch_fraction`` is the share of a task's training
    batches that a method sees in ``before_task`` and ``after_task``: with ``switch_order`` "shuffled" the first ones of
    a shuffled pass, with "evenly" as many samples, evenly spaced in files. ``evaluate_on`` names the split; "both"
    evaluates on test and keeps which items were right, and on validation beside it, for what is to be chosen by it.
    ``threads`` are torch threads per run; ``workers`` are runs at the same time (0: in this process).
    ``trackers`` get the figures besides TensorBoard: "wandb" and "mlflow", through their own packages.
    ``reuse_evaluations`` looks up, in the folder of the results, what was evaluated there before with the same
    weights on the same data. ``plugins`` are modules that are imported first, for the methods and families they
    register. ``precision`` "auto" is bf16 where the device multiplies it natively, else fp32: on a CPU without such
    instructions a step in bf16 was measured ten times as long. What is recorded of a run is what it computed in.
    ``every_method`` are settings of methods without a table of their own (``siblings``); it must give LoRA's
    ``learning_rate``. ``own`` are tasks of the user's own; ``benchmark`` is then only what they are called.
    """

    benchmark: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    out: str = "runs/run"
    epochs: int | tuple[int, ...] | None = None
    steps: int | tuple[int, ...] | None = None
    batch_size: int = 64
    evaluation_batch_size: int = 256
    threads: int = 1
    workers: int = 2
    precision: str = "auto"
    device: str = "cpu"
    weight_decay: float = 0.01
    rate_factors: tuple[float, ...] = ()
    schedule: str = "one-cycle"
    warmup: float = 0.03
    switch_fraction: float = 1.0
    switch_order: str = "shuffled"
    evaluate_on: str = "test"
    tensorboard: bool = True
    trackers: tuple[str, ...] = ()
    keep_states: bool = False
    reuse_evaluations: bool = True
    plugins: tuple[str, ...] = ()
    method: Mapping[str, MethodConfig] = field(default_factory=dict)
    every_method: Mapping[str, Any] = field(default_factory=dict)
    own: OwnTasks | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "plugins", join_plugins(self.plugins))
        validate(self)

    def labels(self) -> tuple[str, ...]:
        """The methods to run, zero-shot first: it is the line that every other result is read against."""
        zero = [label for label in self.methods if self.of(label).method == ZERO_SHOT]
        return (*(zero or [ZERO_SHOT]), *(label for label in self.methods if label not in zero))

    def of(self, label: str) -> MethodConfig:
        """The settings of the method that is called ``label`` here."""
        if label in self.method or not self.every_method or label == ZERO_SHOT:
            return self.method.get(label, MethodConfig(method=label))
        rate, settings = sibling(label, self.every_method)
        return MethodConfig(method=label, learning_rate=rate, settings=settings)

    def pairs(self) -> list[tuple[str, int]]:
        """Every (label, seed) to run, seeds together, so that the first results compare all methods."""
        return [(label, seed) for seed in self.seeds for label in self.labels()]

    def steps_of(self, task: int, batches: int) -> int:
        """Optimizer steps of a task whose pass has so many batches."""
        given = self.epochs if self.steps is None else self.steps
        number = given[task] if isinstance(given, tuple) else given
        assert number is not None  # one of the two is given
        return number * batches if self.steps is None else number

    def rate(self, label: str, task: int) -> float:
        """The highest learning rate of a method in a task."""
        return self.of(label).learning_rate * (self.rate_factors[task] if self.rate_factors else 1.0)

    @property
    def split(self) -> str:
        """The split that a run's accuracies are of."""
        return "test" if self.evaluate_on == BOTH else self.evaluate_on

    @property
    def computes_in(self) -> str:
        """``bf16`` or ``fp32``: the precision, decided for the device of this machine where it is "auto"."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if self.device != "cpu" or _multiplies_bf16() else "fp32"

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, those of ``every_method`` written out for the methods of the run."""
        own = None if self.own is None else self.own.identity()
        values = {**asdict(self), "precision": self.computes_in, "own": own}
        if values.pop("every_method"):
            values["method"] |= {label: asdict(self.of(label)) for label in self.labels()}
        result: dict[str, Any] = json.loads(json.dumps(values))
        return result

    def identity(self, label: str, seed: int) -> dict[str, Any]:
        """The settings that decide the numbers of one run; results are reused only where they agree."""
        chosen = asdict(self.of(label))
        shared = {name: getattr(self, name) for name in _SHARED}
        shared["precision"] = self.computes_in
        shared |= {name: getattr(self, name) for name, was in _NEWER.items() if getattr(self, name) not in (was, ())}
        if self.own is not None:
            shared["own"] = self.own.identity()
        result: dict[str, Any] = json.loads(json.dumps({**shared, "method": chosen, "seed": seed}))
        return result

    def changed(self, other: Mapping[str, Any]) -> list[str]:
        """What differs from the settings in ``other`` (from [`as_dict`][]) among those that decide numbers.

        A different choice of methods or seeds is no difference: their runs stand beside the others.
        """
        mine = self.as_dict()
        names = [name for name in (*_SHARED, "own", *_NEWER) if mine[name] != other.get(name, _NEWER.get(name))]
        theirs = other.get("method", {})
        both = [label for label in self.labels() if label in theirs or label in other.get("methods", ())]
        for label in both:
            default = json.loads(json.dumps(asdict(MethodConfig(method=label))))
            if json.loads(json.dumps(asdict(self.of(label)))) != theirs.get(label, default):
                names.append(f"method.{label}")
        return names


_OWN_TABLES = ("model", "data", "task", "witness")
_SHARED = (
    "benchmark",
    "epochs",
    "steps",
    "batch_size",
    "evaluation_batch_size",
    "threads",
    "precision",
    "device",
    "weight_decay",
    "switch_fraction",
    "evaluate_on",
)
_NEWER = {"rate_factors": [], "schedule": "one-cycle", "warmup": 0.03, "switch_order": "shuffled"}
"""Settings that came later, and what runs without them did."""  # fmt: skip


def _multiplies_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def fingerprint(value: Mapping[str, Any]) -> str:
    """A short hash of plain JSON settings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@named
def load_config(path: str | os.PathLike[str]) -> RunConfig:
    """Read a TOML or YAML file, or a shipped configuration by its name (``"demo"``, ``"quick"``).

    Raises [`ConfigError`][] when the file is missing, cannot be read, is neither, or has unknown or wrong settings.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"load_config: path must name a settings file, got {path!r}.")
    shipped = shipped_configs()
    if str(path) in shipped and not os.path.isfile(path):
        values = parse_toml((resources.files(__package__) / "configs" / f"{path}.toml").read_bytes())
    elif os.path.lexists(path):
        values = read_toml("load_config", path)
    else:
        raise ConfigError(
            f"load_config: path must be a TOML file or one of {', '.join(shipped)}, got {str(path)!r}"
            f"{suggest(str(path), shipped)}"
        )
    return parse_config(values, where=str(path), base=os.path.dirname(os.path.abspath(path)))


def read_toml(function: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a settings file, whoever wrote it, TOML, or YAML where its name ends so.

    ``ConfigError`` where it cannot be read or is neither.
    """
    parse = parse_yaml if os.fspath(path).endswith((".yaml", ".yml")) else parse_toml
    try:
        return parse(read_bytes(path, most=MOST_JSON))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{function}: {os.fspath(path)} must {fault(error)}") from error


def shipped_configs() -> list[str]:
    """Names of the configurations inside the package."""
    folder = resources.files(__package__) / "configs"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def parse_config(values: Mapping[str, Any], *, where: str = "config", base: str = ".") -> RunConfig:
    """Build a ``RunConfig`` from plain values as TOML gives them.

    Where they have tables ``[model]`` and ``[[task]]``, they are a user's own tasks, with paths from ``base`` on; they
    are then called as ``where`` unless ``benchmark`` says otherwise.

    >>> config = parse_config({"benchmark": "embedded", "methods": ["lora"], "epochs": 1,
    ...                        "method": {"lora": {"learning_rate": 3e-4, "r": 8}}})
    >>> config.of("lora").settings
    {'r': 8}
    """
    check_plain(values, "", where=where)
    known = [*(entry.name for entry in fields(RunConfig) if entry.name != "own"), *_OWN_TABLES]
    _known_keys(values, known, where=where)
    chosen = {name: value for name, value in values.items() if name not in _OWN_TABLES}
    of_field = str(chosen["benchmark"]) if chosen.get("benchmark") in BENCHMARKS else ""
    own = {name: values[name] for name in _OWN_TABLES if name in values}
    if own or of_field:
        if "model" in own and "task" not in own and "benchmark" in chosen and not of_field:
            raise ConfigError(
                f"load_config: benchmark must be one of {', '.join(BENCHMARKS)} where there are no tables [[task]], "
                f"got {chosen['benchmark']!r} in {where}{suggest(str(chosen['benchmark']), BENCHMARKS)}"
            )
        chosen["own"] = parse_own(own, base=base, where=where, benchmark=of_field)
        chosen.setdefault("benchmark", os.path.splitext(os.path.basename(where))[0])
    for required in ("benchmark", "methods"):
        if required not in chosen:
            raise ConfigError(f"load_config: {where} must set {required!r}, got only {', '.join(sorted(chosen))}")
    for name in ("methods", "seeds", "rate_factors", "trackers"):
        if name in chosen:
            if not isinstance(chosen[name], list | tuple):
                raise ConfigError(f"load_config: {name} must be a list, got {chosen[name]!r} in {where}")
            chosen[name] = tuple(chosen[name])
    for name in ("epochs", "steps"):
        if isinstance(chosen.get(name), list):
            chosen[name] = tuple(chosen[name])
    sections = chosen.get("method", {})
    if not isinstance(sections, Mapping) or not all(isinstance(entry, Mapping) for entry in sections.values()):
        raise ConfigError(f"load_config: method must hold tables such as [method.lora], got {sections!r} in {where}")
    chosen["method"] = {label: _method(label, dict(entry)) for label, entry in sections.items()}
    return RunConfig(**chosen)


def override(config: RunConfig, **changes: Any) -> RunConfig:
    """``config`` with the given fields replaced; those that are None stay."""
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


def restored(values: Mapping[str, Any]) -> RunConfig:
    """The configuration that ``RunConfig.as_dict`` gave; where its own tasks lie is not known any more.

    >>> config = parse_config({"benchmark": "embedded", "methods": ["lora"], "epochs": [1, 2]})
    >>> restored(config.as_dict()).epochs
    (1, 2)

    Raises:
        ConfigError, AttributeError, TypeError: they are none.
    """
    made: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    made["method"] = {label: MethodConfig(**entry) for label, entry in values.get("method", {}).items()}
    if values.get("own") is not None:
        made["own"] = restored_own(values["own"])
    return RunConfig(**made)


def with_data(own: OwnTasks | None, root: str | None) -> OwnTasks | None:
    """``own`` with another place of a benchmark's data, from the working folder; None stays as it is.

    Raises:
        ConfigError: ``root`` is given, and the configuration is of no benchmark of the field.
    """
    if root is None:
        return own
    if own is None or not own.benchmark:
        raise ConfigError(
            f"load_config: --data must go with one of {', '.join(BENCHMARKS)}, got {root!r}. Other settings files name "
            "their data themselves"
        )
    return replace(own, data=replace(own.data, root=os.path.abspath(root)))


def _method(label: str, entry: dict[str, Any]) -> MethodConfig:
    method = entry.pop("method", label)
    rate = entry.pop("learning_rate", 1e-3)
    decay = entry.pop("weight_decay", None)
    return MethodConfig(method=method, learning_rate=rate, weight_decay=decay, settings=entry)


def _known_keys(values: Mapping[str, Any], known: list[str], *, where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(
                f"load_config: every setting must be known, got {key!r} in {where}{suggest(key, known, listing=True)}"
            )
