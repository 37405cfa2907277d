"""A settings file for a folder of data: every setting that matters, why it is so, and what else it could be."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from keeplora._files import write_atomic
from keeplora._messages import listed, suggest
from keeplora._untrusted import parse_toml
from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.config import FAULTS, DataSettings, ModelSource, parse_own
from keeplora.tasks.own.draft_text import Lines, printable, quoted
from keeplora.tasks.own.faults import Fault
from keeplora.tasks.own.kinds import MEANINGS
from keeplora.tasks.own.look import look
from keeplora.tasks.own.look_tree import DataFolder, DataTask

__all__ = ["draft", "init", "split_sizes"]

_DATA = DataSettings()
_DOES = {"skip": "leaves them out", "convert": "takes them as RGB", "cut": "cuts them", "allow": "keeps them"}
_RATE_CLASSES = 1e-3
"""Of CLIP ViT-B/16 in docs/which-settings.md, for LoRA and KeepLoRA."""
_RATE_ANSWERS = 1e-4
"""Between the published rates of a 7B model, 2e-5 to 2e-4 (docs/which-settings.md)."""
_STEPS = 40
"""Of the smallest task: what keeplora/compare/settings/embedded.toml trains a task for; clip-b16.toml has half."""


def init(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] = "tasks.toml",
    *,
    model: str = "",
    force: bool = False,
    device: str = "cpu",
    threads: int = 1,
) -> str:
    """Look at a folder of data, write the settings file ``out`` for ``keeplora run``, and return a summary to print.

    Args:
        model: As `draft` has it.
        force: Whether a file that is there is written anew.
        device: What the draft trains on.
        threads: torch threads of a run.

    Raises:
        ConfigError: ``out`` is there (nothing is looked at then) or no TOML file; or the folder is not recognised.
        WriteError: ``out`` cannot be written.
    """
    target = Path(out)
    if target.suffix.lower() != ".toml":
        raise ConfigError(f"init: out must be a .toml file, got {str(target)!r}")
    if os.path.lexists(target) and not force:
        raise ConfigError(f"init: out must not be there, got {str(target)!r}. Add --force to write it anew")
    seen = look(folder)
    text = draft(seen, target, model=model, device=device, threads=threads)
    write_atomic(target, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))
    return "\n".join(_summary(seen, target))


def draft(seen: DataFolder, out: Path, *, model: str = "", device: str = "cpu", threads: int = 1) -> str:
    """The text of a settings file that lies at ``out``: paths in it begin in that folder.

    Args:
        model: ``"ViT-B-16/openai"``, a name and weights of open_clip; ``"hf-hub:…"``, ``"local-dir:…"``; or
            ``"transformers:…"``, an id or a folder. For tasks of answers the id or folder alone. Empty: a usual one.

    Examples:
        >>> task = DataTask("birds", "folder", Path("/data/birds"), {"train": 40}, {"owl": {"train": 40}})
        >>> text = draft(DataFolder(Path("/data"), (task,), (), 40, 40), Path("/settings/tasks.toml"))
        >>> print(text[text.index("[[task]]"):].splitlines()[-1])
        folder = "../data/birds"
    """
    base = Path(os.path.abspath(out)).parent
    source = _model(model, seen.answers)
    lines = Lines()
    lines.comment(
        f"Settings for `keeplora run {out.name}`, drafted by `keeplora init` from {quoted(str(seen.folder))}.",
        "Every line is yours to change; paths begin in this file's folder. All settings: docs/own-tasks.md.",
        *(f"Note: {remark}." for remark in seen.remarks),
    )
    lines.blank()
    _training(lines, seen, out, device, threads)
    _pretrained(lines, source, model, seen.answers)
    _methods(lines, source, seen.answers)
    _data(lines, seen)
    for place, task in enumerate(seen.tasks):
        _task(lines, task, place, seen, base)
    text = lines.text()
    tables = {name: table for name, table in parse_toml(text.encode()).items() if name in ("model", "data", "task")}
    parse_own(tables, base=str(base), where=out.name)  # nothing is handed out that a run would not read
    return text


def _training(lines: Lines, seen: DataFolder, out: Path, device: str, threads: int) -> None:
    batch = 8 if seen.answers else 32
    once = {task.name: -(-split_sizes(task)["train"] // batch) for task in seen.tasks if task.counts}
    epochs = _epochs(min(once.values(), default=0), seen.answers)
    steps = {name: count * epochs for name, count in once.items()}
    lines.set(
        "methods", ["zero-shot", "lora", "keeplora"],
        "zero-shot is the model as it is: what the others are read against. lora is what forgetting looks like. More: "
        "keeplora++, full, inflora, o-lora, … (`keeplora info` lists them).",
    )  # fmt: skip
    lines.set("seeds", [0], "One seed is a first look; [0, 1, 2] before you believe a difference of a point.")
    lines.set("out", f"runs/{out.stem}", "Where results go; the same command continues there.")
    each = listed([f"{count} for {quoted(name)}" for name, count in steps.items()], 8)
    taught = f" In steps: {each}." if steps else ""
    lines.set(
        "epochs", epochs,
        f"How often each task's training data is passed.{taught} Or say how many with steps = 200, the same for "
        "every task.",
    )  # fmt: skip
    lines.set("batch_size", batch, "As large as memory allows; with more, raise learning rates a little.")
    if steps and min(steps.values()) >= 20 * epochs:
        lines.set(
            "switch_fraction", 0.25,
            "Share of a task's batches that give its mean gradient and its features; 1.0 is all of them.",
        )  # fmt: skip
    lines.set("evaluate_on", "test", '"validation" while you choose settings: it keeps the test data for the end.')
    there = "a GPU was there when this was drafted" if device == "cuda" else "no GPU was there when this was drafted"
    lines.set("device", device, f'"cuda" or "cpu": {there}.')
    lines.set("workers", 1, "Runs at the same time, each with a model of its own.")
    lines.set(
        "threads", threads, "Threads of torch for each run. Part of a run's identity, so choose before you begin."
    )


def _pretrained(lines: Lines, source: ModelSource, asked: str, answers: bool) -> None:
    lines.table("[model]")
    if asked:
        lines.comment("As --model said.")
    elif answers:
        lines.comment(
            "A placeholder: any vision-language model of transformers, by id or folder, with the processor beside it. "
            "This one takes 14 GB in bfloat16 and is downloaded at the first run."
        )
    else:
        lines.comment(
            "CLIP as it was published. A larger one: ViT-L-14 with openai. Others: `open_clip.list_pretrained()`, "
            '"hf-hub:…", "local-dir:…"; or transformers = "…" instead of both lines. Weights are downloaded once.'
        )
    for name in ("open_clip", "pretrained", "transformers"):
        if value := getattr(source, name):
            lines.set(name, value)
    lines.set("dtype", source.dtype, "What the weights are kept in: float32, bfloat16 or float16.")


def _methods(lines: Lines, source: ModelSource, answers: bool) -> None:
    rate = _RATE_ANSWERS if answers else _RATE_CLASSES
    where = (
        "between the published rates of 7B models, 2e-5 to 2e-4" if answers
        else "what a CLIP ViT-B/16 learned at in a few hundred steps (docs/which-settings.md)"
    )  # fmt: skip
    # layers of open_clip's own towers; those of timm, as SigLIP's, have names of their own
    vit = re.fullmatch(r"ViT-\w+-\d+(-\d+|-plus|-quickgelu)*", source.open_clip)
    for label in ("lora", "keeplora"):
        lines.table(f"[method.{label}]")
        lines.set(
            "learning_rate", rate,
            f"A start: {where}. Nothing was searched on your data, so try a third and three times as much, on "
            "validation data (evaluate_on = \"validation\" above)." if label == "lora"
            else "The same start, so that the first comparison is even. Each method has a best rate of its own.",
        )  # fmt: skip
        lines.set("r", 16, "Rank of a task's adapter." if label == "lora" else "As lora's.")
        if vit:
            modules = '["attn"] (all of attention) and "all-linear" learn more and keep less.'
            lines.set(
                "target_modules", ["v_proj", "out_proj"], f"The adapted layers. {modules}" if label == "lora" else ""
            )
        elif label == "lora":
            lines.comment('target_modules = "all-linear" adapts every linear layer; the default is attention\'s.')
        if label == "keeplora":
            energy = {"language": 0.6} if answers else {"vision": 0.85, "text": 0.2}
            lines.set(
                "weight_energy", energy,
                "Share of the pretrained weights' energy that is protected: more keeps more of what the model knew.",
            )  # fmt: skip
            lines.set(
                "feature_energy", 0.95,
                "Share of every learned task's features that is protected: more keeps tasks, less leaves room for new.",
            )  # fmt: skip


def _data(lines: Lines, seen: DataFolder) -> None:
    lines.table("[data]")
    if seen.answers:
        lines.set("max_new_tokens", 64, "Most tokens of an answer.")
    else:
        lines.set(
            "template", _DATA.template,
            "The text of a class; {} is its name. A task may have its own: \"a photo of a {}, a type of bird.\"",
        )  # fmt: skip
    lines.set(
        "test_fraction", _DATA.test_fraction,
        "Kept for testing where a task has no test data of its own; counts are below.",
    )  # fmt: skip
    lines.set(
        "validation_fraction", _DATA.validation_fraction,
        "Kept of the training data for choices, such as learning rates, where a task has no validation data.",
    )  # fmt: skip
    lines.set("split_seed", _DATA.split_seed, "Decides both, whatever the seed of a run.")
    _faults(lines, seen)


def _faults(lines: Lines, seen: DataFolder) -> None:
    lines.table("[data.faults]")
    every = -(-seen.pictures // seen.looked_at) if seen.looked_at else 0
    share = "all" if seen.looked_at == seen.pictures else f"every {every}th"
    if seen.pictures:
        lines.comment(
            f"{seen.looked_at} of {seen.pictures} images were opened ({share}), their headers alone: a file that ends "
            "too early shows when a run decodes it, and an alpha channel may be opaque, which is no fault."
        )
    else:
        lines.comment("No image was opened: the first run does, and names what is wrong.")
    lines.comment(
        'What is done about data that is not as it should be. "refuse", the default, stops before training and names '
        "it; the choice is yours. Other kinds: " + ", ".join(kind for kind in FAULTS) + "."
    )
    for kind, faults in _by_kind(seen.faults).items():
        others = " or ".join(f'"{action}" {_DOES[action]}' for action in FAULTS[kind][1:])
        tasks = Counter(fault.task for fault in faults)
        places = listed([f"{quoted(name)} ({count})" for name, count in tasks.items()], 8)
        first = quoted(_shortened(faults[0].where, seen.folder)) + (f" ({faults[0].why})" if faults[0].why else "")
        why = f"{len(faults)} {MEANINGS[kind]}, in {places}. The first: {first}. Otherwise: {others}."
        lines.set(kind, FAULTS[kind][0], why)


def _task(lines: Lines, task: DataTask, place: int, seen: DataFolder, base: Path) -> None:
    lines.table("[[task]]")
    if place == 0 and len(seen.tasks) > 1:
        lines.comment(
            "Tasks are learned in the order they stand in here, which is alphabetical because nothing else was known. "
            "It is a choice and changes the numbers: move the tables as you need."
        )
    unit = "samples" if seen.answers or task.kind == "dataset" else "images"
    given = ", ".join(f"{split} {count}" for split, count in task.counts.items())
    if given:
        sizes = split_sizes(task)
        split = ", ".join(f"{name} {count}" for name, count in sizes.items())
        lines.comment(f"{sum(task.counts.values())} {unit} ({given}); about {split} after splitting.")
    if task.classes:
        smallest = min((label for label in task.classes if task.train_of(label)), key=task.train_of, default=None)
        size = "" if smallest is None else (
            f"; the smallest is {quoted(smallest)} with {task.train_of(smallest)} to train on and to split"
        )  # fmt: skip
        lines.comment(f"{len(task.classes)} classes: {listed([quoted(label) for label in task.classes], 5)}{size}.")
    lines.comment(*(f"Note: {remark}." for remark in task.remarks))
    lines.set("name", task.name)
    lines.set(task.kind, _path(task.place, base))
    for name in ("validation", "test", "images"):
        if (path := getattr(task, name)) is not None:
            lines.set(name, _path(path, base))
    for name in ("image_column", "label_column"):
        if column := getattr(task, name):
            lines.set(name, column)


def split_sizes(task: DataTask, data: DataSettings = _DATA) -> dict[str, int]:
    """How many are for training, validation and testing, as `DataSettings` splits what has no split of its own.

    To within rounding: a few a class.

    >>> split_sizes(DataTask("birds", "folder", Path("birds"), {"train": 100}))
    {'train': 72, 'validation': 8, 'test': 20}
    """
    rest = task.counts.get("train", 0)
    test = task.counts.get("test") or round(rest * data.test_fraction)
    rest -= 0 if task.counts.get("test") else test
    validation = task.counts.get("validation") or round(rest * data.validation_fraction)
    rest -= 0 if task.counts.get("validation") else validation
    return {"train": rest, "validation": validation, "test": test}


def _by_kind(faults: Sequence[Fault]) -> Mapping[str, list[Fault]]:
    """Faults in the order of `FAULTS`."""
    return {kind: those for kind in FAULTS if (those := [fault for fault in faults if fault.kind == kind])}


def _model(name: str, answers: bool) -> ModelSource:
    """The model that ``--model`` means.

    Raises:
        ConfigError: a name that open_clip, where it is installed, does not have.
    """
    if answers or name.startswith("transformers:"):
        chosen = name.removeprefix("transformers:") or "llava-hf/llava-1.5-7b-hf"
        local = os.path.abspath(chosen) if os.path.isdir(chosen) else chosen
        return ModelSource(transformers=local, dtype="bfloat16" if answers else "float32")
    if name.startswith(("hf-hub:", "local-dir:")):
        return ModelSource(open_clip=name)
    architecture, _, pretrained = (name or "ViT-B-16/openai").partition("/")
    if name and (known := _architectures()) and architecture not in known:
        raise ConfigError(
            f"init: model must be of open_clip, as ViT-B-16/openai is, got {name!r}{suggest(architecture, known)} "
            "For a model of transformers write transformers:ID"
        )
    return ModelSource(open_clip=architecture, pretrained=pretrained or "openai")


def _architectures() -> list[str]:
    """Those that open_clip has; none where it is not installed."""
    try:
        import open_clip  # optional
    except ImportError:
        return []
    return list(open_clip.list_models())


def _epochs(steps: int, answers: bool) -> int:
    """Passes over the data: few, but enough that the smallest task, of so many steps a pass, learns at all."""
    fewest = 1 if answers else 5
    return max(fewest, min(-(-_STEPS // steps), 50)) if steps else fewest


def _path(path: Path, base: Path) -> str:
    """``path`` as it is read from a file in ``base``: relative, unless that leads elsewhere, by a link or a ``~``."""
    try:
        relative = os.path.relpath(path, base)
    except ValueError:  # on another drive
        return path.as_posix()
    same = os.path.realpath(base / relative) == os.path.realpath(path)
    return Path(relative).as_posix() if same and not relative.startswith("~") else path.as_posix()


def _shortened(where: str, folder: Path) -> str:
    return os.path.relpath(where, folder) if os.path.isabs(where) else where


def _summary(seen: DataFolder, target: Path) -> Iterator[str]:
    tasks = "task" if len(seen.tasks) == 1 else "tasks"
    yield f"{len(seen.tasks)} {tasks} of {'answers' if seen.answers else 'classes'} in {quoted(str(seen.folder))}:"
    for task in seen.tasks:
        given = ", ".join(f"{split} {count}" for split, count in task.counts.items()) or "not counted"
        classes = f", {len(task.classes)} classes" if task.classes else ""
        yield f"  {quoted(task.name)}: {given}{classes}"
        yield from (f"    {printable(remark)}" for remark in task.remarks)
    if len(seen.tasks) > 1:
        yield "The order is alphabetical, which is a choice: move the tables [[task]] as you need."
    yield from (f"Note: {printable(remark)}." for remark in seen.remarks)
    if seen.pictures:
        yield f"{seen.looked_at} of {seen.pictures} images were opened, their headers alone."
    if kinds := _by_kind(seen.faults):
        yield "To decide in [data.faults]; a run refuses these until then:"
        for kind, faults in kinds.items():
            where = printable(_shortened(faults[0].where, seen.folder))
            yield f"  {kind}: {len(faults)} {MEANINGS[kind]}, {where} first"
    yield f"Written: {target}"
    yield f"Next: keeplora run {shlex.quote(str(target))} --dry-run"
