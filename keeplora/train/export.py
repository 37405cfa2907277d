"""What a finished run leaves for others: the merged model in its library's own form, and a PEFT adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import nn

from keeplora._files import write_atomic
from keeplora.lora.base_model import BaseModel
from keeplora.lora.peft_checkpoint import require_peft
from keeplora.methods import create
from keeplora.methods.card import Story, model_card, write_card
from keeplora.methods.settings import ConfigError, plain
from keeplora.methods.state import has_state
from keeplora.tasks.workload import ModelOrigin, Workload
from keeplora.train.config import ZERO_SHOT, RunConfig
from keeplora.train.loop import seeded_settings
from keeplora.train.record import RunRecord, load_progress, run_folder

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

__all__ = ["ExportableWorkload", "check_exportable", "export_runs"]

MERGED, ADAPTER = "model", "adapter"


@runtime_checkable
class ExportableWorkload(Protocol):
    """A workload whose model can be written in the form of the library that it comes from."""

    @property
    def origin(self) -> ModelOrigin:
        """Where the pretrained model comes from."""

    def save_model(self, model: nn.Module, folder: Path) -> str:
        """Write a merged model; returns the line of Python that loads it."""


def export_runs(config: RunConfig, workload: Workload) -> list[str]:
    """Write the models of all finished runs below their folders; returns a line for each method and seed.

    ``export/model`` is the merged model; ``export/adapter`` the sum of all tasks' updates as an adapter of stock PEFT,
    for the pretrained model, where the method's updates are a sum of adapters.

    Raises:
        ConfigError: the model's library is not known, or a run has kept no state.
    """
    check_exportable(config, workload)
    pairs = [(label, seed) for label, seed in config.pairs() if config.of(label).method != ZERO_SHOT]
    for label, seed in pairs:
        if not has_state((folder := run_folder(config.out, label, seed)) / "state"):
            raise ConfigError(
                f"export_runs: {folder} must hold the state of the run, got none: it was made without --export and "
                "without keep_states. Give another --out to have them made"
            )
    return [line for label, seed in pairs for line in _export(config, workload, label, seed)]


def check_exportable(config: RunConfig, workload: Workload) -> None:
    """Refuse, before anything is trained, a model that no library would know how to load, and adapters without PEFT.

    `ConfigError`.
    """
    if not isinstance(workload, ExportableWorkload):
        raise ConfigError(
            "export_runs: export must be of your own tasks, with a model of open_clip or transformers, got the "
            f"benchmark {config.benchmark!r}. Leave --export out"
        )
    try:
        require_peft("export_runs")
    except ImportError as error:
        raise ConfigError(f"{str(error).removesuffix('.')}, or leave --export out") from error


def _export(config: RunConfig, workload: Any, label: str, seed: int) -> list[str]:
    folder = run_folder(config.out, label, seed)
    saved = load_progress(folder, config.identity(label, seed))
    assert saved is not None
    record, state = saved
    method = create(config.of(label).method, workload.model(), seeded_settings(config, label, seed))
    method.load_state(state)
    place, lines = folder / "export", []
    origin: ModelOrigin = workload.origin
    data, training = _results(record, origin), _training(config, record)
    lines.append(f"{label}, seed {seed}: {_export_adapter(method, place / ADAPTER, origin, training, data)}")
    if not method.merges:
        return [*lines, f"{label}, seed {seed}: no merged model, because what it learned is more than weights"]
    story = Story(
        method.name, plain(method.config), method.tasks_learned, BaseModel(origin.name), record.certificates,
        method.capacity(), training=training,
    )  # fmt: skip
    how = workload.save_model(method.merge(), place / MERGED)
    load = how.replace(str((place / MERGED).resolve()), "this folder")
    load = f"import {origin.library}\n\nmodel = {load}"
    write_card(place / MERGED, model_card(story, data, library=origin.library, load=load))
    _write_readme(place / "README.md", config, label, seed, how)
    return [*lines, f"{label}, seed {seed}: model in {place / MERGED}; load it by {how}"]


def _results(record: RunRecord, origin: ModelOrigin) -> Any:
    """A card's metadata: the accuracy in every task after the last one."""
    from huggingface_hub import EvalResult, ModelCardData  # with every library whose models are exported

    pairs = zip(record.tasks, record.accuracy[-1], strict=True)
    results = [
        EvalResult(
            task_type=origin.scored, dataset_type=re.sub(r"[^\w.-]+", "-", name), dataset_name=name,
            metric_type="accuracy", metric_value=round(value, 4), dataset_split="test",
        )
        for name, value in pairs
    ]  # fmt: skip
    return ModelCardData(eval_results=results, model_name=f"{record.label}, seed {record.seed}")


def _training(config: RunConfig, record: RunRecord) -> dict[str, Any]:
    """What else a card tells: how this run was trained."""
    length = {"steps": config.steps} if config.epochs is None else {"epochs": config.epochs}
    return {
        "tasks, in this order": list(record.tasks), "learning_rate": config.of(record.label).learning_rate, **length,
        "batch_size": config.batch_size, "precision": config.precision, "seed": record.seed,
    }  # fmt: skip


def _export_adapter(
    method: Any, folder: Path, origin: ModelOrigin, training: Mapping[str, Any], data: ModelCardData
) -> str:
    if not hasattr(method, "export_peft"):
        return "no adapter of PEFT: this method's updates are none"
    try:
        method.export_peft(folder, base_model=origin.name, training=training, card=data)
    except (RuntimeError, TypeError, ValueError) as error:  # its documented refusals, which say why
        return f"no adapter of PEFT: {error}"
    return f"adapter of PEFT in {folder}"


def _write_readme(path: Path, config: RunConfig, label: str, seed: int, how: str) -> None:
    """What these files are and how they are loaded."""
    chosen: Mapping[str, Any] = {"learning_rate": config.of(label).learning_rate, **config.of(label).settings}
    text = (
        f"# {config.of(label).method} on {config.benchmark}\n\n"
        f"Made by keeplora, run {label!r}, seed {seed}, settings {json.dumps(chosen)}.\n\n"
        "Each has a model card of its own.\n\n"
        f"* `{MERGED}/`: the pretrained model with all updates in its weights. Load it by `{how}`.\n"
        f"* `{ADAPTER}/`, if there: the updates alone, for `PeftModel.from_pretrained(pretrained_model, …)`.\n"
    )
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
