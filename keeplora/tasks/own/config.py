"""What a settings file says of a user's own tasks: the model, where each task's data is, and what may be left out.

Written as three tables, here in TOML:

    [model]
    open_clip = "ViT-B-16"
    pretrained = "openai"

    [data]
    template = "a photo of a {}."

    [[task]]
    name = "birds"
    folder = "data/birds"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from keeplora._messages import suggest
from keeplora.methods.settings import (
    ConfigError,
    ConfigTypeError,
    Settings,
    check_choice,
    check_name,
    check_range,
    check_whole,
)
from keeplora.tasks.field.catalog import instruction_benchmark, is_of_images
from keeplora.tasks.own.broken import broken_name
from keeplora.tasks.own.config_checks import check_template, check_texts, made
from keeplora.tasks.own.kinds import FAULTS

__all__ = ["FAULTS", "DataSettings", "ModelSource", "OwnTasks", "TaskSource", "parse_own", "restored_own"]

DTYPES = ("float32", "bfloat16", "float16")
TEST_TEXTS = ("first", "mean")
KINDS = ("folder", "dataset", "json")
"""What a task can be, and the setting that says where it is."""


@dataclass(frozen=True)
class ModelSource(Settings):
    """The pretrained model: one of open_clip's, or one of transformers'.

    Args:
        open_clip: Name of an architecture (``"ViT-B-16"``), ``"hf-hub:…"`` or ``"local-dir:…"``.
        pretrained: open_clip's tag of the weights, or a file with them. ``"random"`` leaves them as initialised.
        transformers: Id or folder of a model, with the processor beside it.
        dtype: What the weights are kept in.
    """

    open_clip: str = ""
    pretrained: str = ""
    transformers: str = ""
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_texts(self)
        if bool(self.open_clip) == bool(self.transformers):
            raise ConfigError(
                "ModelSource: exactly one of open_clip and transformers must be given, got "
                f"{'both' if self.open_clip else 'none'}"
            )
        if self.transformers and self.pretrained:
            raise ConfigError(
                f"ModelSource: pretrained must be left out with transformers, got {self.pretrained!r}. "
                "The id or folder has the weights"
            )
        whole = self.open_clip.startswith(("hf-hub:", "local-dir:"))
        if self.open_clip and not self.pretrained and not whole:
            raise ConfigError(
                f"ModelSource: pretrained must be given with open_clip = {self.open_clip!r}, got none. "
                'Give a tag such as "openai", a file, or "random" to train from nothing'
            )
        check_choice(self, "dtype", DTYPES)


@dataclass(frozen=True)
class DataSettings(Settings):
    """What all tasks share.

    Args:
        template: The text of a class, ``{}`` stands for its name.
        templates: More of them, for tests; a benchmark of the field has its own.
        test_texts: ``"first"``, or ``"mean"``: a class is then the normalised mean of its texts, as ZSCL tests.
        test_fraction: Share of every class that is kept for testing where a task has no test data of its own.
        validation_fraction: Share of the training data that is kept for choices where a task has no validation data.
        split_seed: Decides both, whatever the seed of a run.
        cache: Folder of decoded images, for all runs. Empty: ``keeplora`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        cache_gb: How many GB (10⁹ bytes) of decoded images one settings file may keep there; the rest is decoded again.
        readers: Threads that decode images.
        max_new_tokens: Most tokens of an answer; for models that generate. None: the benchmark's number, else 64.
        evaluate_at_most: How many samples of a split are evaluated, evenly spaced, for a quick look. 0: all.
        root: Folder that a benchmark of the field is unpacked in; with ``benchmark = "mtil"`` and the like.
        order: Which of its orders.
        shots: Training images of each class; None for what the benchmark says, 0 for all.
        shots_seed: Draws them.
        faults: What is done about data that is not as it should be: [`FAULTS`].
    """

    template: str = "a photo of a {}."
    templates: tuple[str, ...] = ()
    test_texts: str = "first"
    test_fraction: float = 0.2
    validation_fraction: float = 0.1
    split_seed: int = 0
    cache: str = ""
    cache_gb: float = 8.0
    readers: int = 2
    max_new_tokens: int | None = None
    evaluate_at_most: int = 0
    root: str = ""
    order: str = "I"
    shots: int | None = None
    shots_seed: int = 42
    faults: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_template(self, self.template)
        if not isinstance(self.templates, list | tuple):
            raise ConfigTypeError(f"DataSettings: templates must be a list, got {self.templates!r}")
        object.__setattr__(self, "templates", tuple(self.templates))
        for template in self.templates:
            check_template(self, template)
        check_choice(self, "test_texts", TEST_TEXTS)
        check_whole(self, "shots", "[0, inf)", optional=True)
        check_whole(self, "shots_seed", "[0, inf)")
        check_range(self, "test_fraction", "(0, 1)")
        check_range(self, "validation_fraction", "[0, 1)")
        check_whole(self, "split_seed", "[0, inf)")
        check_range(self, "cache_gb", "[0, inf)")
        check_whole(self, "readers", "[1, inf)")
        check_whole(self, "max_new_tokens", "[1, inf)", optional=True)
        check_whole(self, "evaluate_at_most", "[0, inf)")
        for name in ("cache", "root", "order"):
            if not isinstance(value := getattr(self, name), str):
                raise ConfigTypeError(f"DataSettings: {name} must be text, got {value!r}")
        if not isinstance(self.faults, Mapping):
            raise ConfigTypeError(f"DataSettings: faults must be a table, got {self.faults!r}")
        for kind, action in self.faults.items():
            if kind not in FAULTS:
                raise ConfigError(
                    f"DataSettings: faults must be known, got {kind!r}{suggest(kind, FAULTS, listing=True)}"
                )
            check_choice(self, f"faults.{kind}", FAULTS[kind], value=action)

    def action(self, kind: str) -> str:
        """What is done about faults of this kind."""
        return self.faults.get(kind, FAULTS[kind][0])


@dataclass(frozen=True)
class TaskSource(Settings):
    """One task: a name, and exactly one of ``folder``, ``dataset`` and ``json``.

    Args:
        folder: Image folders: ``class/*.jpg``, or ``train/class/*.jpg`` and ``test/class/*.jpg`` (``val``, too).
        dataset: What `datasets` reads: a folder or file of parquet, jsonl, csv or arrow.
        json: Training samples in LLaVA's form, JSON or JSONL.
        test: Test samples, beside ``json`` or ``dataset``.
        validation: those for choices.
        images: Folder that the image paths of ``json`` begin in; the file's own if empty.
        image_column: Column of ``dataset`` that holds images.
        label_column: the one that holds classes.
        template: The text of a class in this task; ``[data]``'s if empty.
    """

    name: str
    folder: str = ""
    dataset: str = ""
    json: str = ""
    test: str = ""
    validation: str = ""
    images: str = ""
    image_column: str = ""
    label_column: str = ""
    template: str = ""

    def __post_init__(self) -> None:
        check_name(self, "name")
        check_texts(self)
        given = [kind for kind in KINDS if getattr(self, kind)]
        if len(given) != 1:
            raise ConfigError(
                f"TaskSource: exactly one of {', '.join(KINDS)} must be given, got {' and '.join(given) or 'none'} "
                f"in task {self.name!r}"
            )
        if self.template:
            check_template(self, self.template)
        for names, kinds in ((("test", "validation"), ("dataset", "json")), (("images",), ("json",)),
                             (("image_column", "label_column"), ("dataset",))):  # fmt: skip
            for name in names:
                if getattr(self, name) and given[0] not in kinds:
                    raise ConfigError(
                        f"TaskSource: {name} must stand beside {' or '.join(kinds)}, got {getattr(self, name)!r} "
                        f"beside {given[0]} in task {self.name!r}"
                    )

    @property
    def kind(self) -> str:
        """``"folder"``, ``"dataset"`` or ``"json"``."""
        return next(kind for kind in KINDS if getattr(self, kind))


@dataclass(frozen=True)
class OwnTasks(Settings):
    """A user's own tasks, in learning order, or those of a benchmark of the field; and the model that learns them.

    ``base`` is the folder that relative paths begin in: the settings file's. ``witness`` is evaluated, never trained.
    """

    model: ModelSource
    tasks: tuple[TaskSource, ...]
    data: DataSettings = field(default_factory=DataSettings)
    witness: TaskSource | None = None
    base: str = "."
    benchmark: str = ""

    def __post_init__(self) -> None:
        images = bool(self.benchmark) and is_of_images(self.benchmark)
        for name, usual in (("root", ""), ("order", "I"), ("shots", None)):
            if getattr(self.data, name) != usual and not (images or (name == "root" and self.benchmark)):
                raise ConfigError(
                    f"OwnTasks: {name} must be left out but for benchmarks of images, got {getattr(self.data, name)!r} "
                    f"with {self.benchmark or 'tasks of your own'}"
                )
        if self.benchmark:
            return
        if not self.tasks:
            raise ConfigError("OwnTasks: tasks must hold at least one task, got none. Add a table [[task]]")
        names = [task.name for task in self.all]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"OwnTasks: every task must have a name of its own, got {name!r} twice")
        kinds = {"answers" if task.kind == "json" else "classes" for task in self.all}
        if len(kinds) > 1:
            raise ConfigError(
                "OwnTasks: tasks must be all json (a model that answers) or none of them (a model that compares), got "
                "both. Make two files"
            )
        if kinds == {"answers"} and not self.model.transformers:
            raise ConfigError(
                f"OwnTasks: model must be one of transformers for tasks of json, got {self.model.open_clip!r}. "
                'Set transformers = "…" in [model]'
            )

    @property
    def all(self) -> tuple[TaskSource, ...]:
        """The tasks, and the witness where there is one."""
        return (*self.tasks, *([] if self.witness is None else [self.witness]))

    @property
    def answers(self) -> bool:
        """Whether the model generates answers; else it compares images with the texts of classes."""
        if self.benchmark:
            return not is_of_images(self.benchmark)
        return self.tasks[0].kind == "json"

    @property
    def data_root(self) -> Path:
        """Where the data of a benchmark of the field is.

        Raises:
            ConfigError: the settings do not say, or there is no such folder.
        """
        root = self.path(self.data.root)
        if not self.data.root or not root.is_dir():
            raise ConfigError(
                f"open_workload: root must say where the data of {self.benchmark} is, got "
                f"{f'no folder {root}' if self.data.root else 'none'}. Set root in [data], or give --data FOLDER; "
                "docs/benchmarks.md has the layout"
            )
        return root

    def model_folder(self) -> str:
        """The id or folder of a model of transformers, a folder as an absolute path.

        Raises:
            ConfigError: it looks like a folder, and there is none.
        """
        name = self.model.transformers
        folder = self.path(name)
        if folder.is_dir():
            return str(folder)
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ConfigError(
                f"open_workload: transformers must be an id or a folder, got {name!r}, and no folder {folder}. Paths "
                "begin in the folder of the settings file"
            )
        return name

    @property
    def new_tokens(self) -> int:
        """Most tokens of an answer."""
        if self.data.max_new_tokens is not None:
            return self.data.max_new_tokens
        return instruction_benchmark(self.benchmark).max_new_tokens if self.benchmark and self.answers else 64

    def path(self, name: str) -> Path:
        """A path of the settings file, from ``base`` where it is relative; ``~/`` is the home folder.

        Raises:
            ConfigError: no file system has such a name.
        """
        if why := broken_name(name):
            raise ConfigError(f"OwnTasks: paths must be of names that file systems have, got {why}: {name[:60]!r}…")
        return Path(self.base) / (Path(name).expanduser() if name.startswith("~/") else name)

    def identity(self) -> dict[str, Any]:
        """The settings that decide numbers: neither where the file lies, nor what is only about speed."""
        plain = asdict(self)
        del plain["base"]
        for name in ("cache", "cache_gb", "readers", "root"):
            del plain["data"][name]
        return plain


def restored_own(values: Mapping[str, Any]) -> OwnTasks:
    """The tasks that [`OwnTasks.identity`] gave; where they lie is not known any more.

    Raises:
        ConfigError, AttributeError, KeyError, TypeError: they are none.
    """
    return OwnTasks(
        ModelSource(**values["model"]),
        tuple(TaskSource(**task) for task in values["tasks"]),
        DataSettings(**values["data"]),
        None if values["witness"] is None else TaskSource(**values["witness"]),
        benchmark=values["benchmark"],
    )


def parse_own(values: Mapping[str, Any], *, base: str, where: str, benchmark: str = "") -> OwnTasks:
    """The tables ``model``, ``data``, ``task`` and ``witness`` of a settings file.

    Args:
        values: Those tables as TOML or YAML give them.
        base: Folder of the file.
        where: What messages call it.
        benchmark: A benchmark of the field, whose tasks they are; there are no tables ``task`` then.

    Raises:
        ConfigError: a table or setting is missing, unknown or wrong.

    Examples:
        >>> own = parse_own({"model": {"transformers": "models/vlm"}, "task": [{"name": "a", "json": "a.json"}]},
        ...                 base=".", where="tasks.toml")
        >>> own.answers, own.tasks[0].kind
        (True, 'json')
    """
    for name in ("model",) if benchmark else ("model", "task"):
        if name not in values:
            raise ConfigError(f"load_config: {where} must have {_TABLES[name]}, got none. {_REMEDIES[name]}")
    tasks = values.get("task", ())
    if benchmark and (tasks or "witness" in values):
        raise ConfigError(
            f"load_config: benchmark = {benchmark!r} has its own tasks, got a table [[task]] or [witness] beside it in "
            f"{where}. Leave one of them out"
        )
    if not isinstance(tasks, list | tuple):
        raise ConfigError(f"load_config: task must be a list of tables [[task]], got {tasks!r} in {where}")
    return OwnTasks(
        benchmark=benchmark,
        base=base,
        model=made(ModelSource, values["model"], "[model]", where),
        tasks=tuple(made(TaskSource, task, "[[task]]", where) for task in tasks),
        data=made(DataSettings, values.get("data", {}), "[data]", where),
        witness=None if "witness" not in values else made(TaskSource, values["witness"], "[witness]", where),
    )


_TABLES = {"model": "a table [model]", "task": "tables [[task]]"}
_REMEDIES = {
    "model": 'Write [model] with open_clip = "ViT-B-16" and pretrained = "openai", or with transformers = "…"',
    "task": 'Write [[task]] with name = "…" and folder = "…" for every task',
}
