"""Model cards: what an adapter or a merged model is, where it comes from, and what may be asked of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from keeplora._files import write_atomic
from keeplora._messages import warn
from keeplora._version import __version__
from keeplora.lora.base_model import BaseModel

from .capacity import Capacity

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

__all__ = ["Story", "model_card", "write_card"]

CARD = "README.md"
MARK = "<!-- keeplora writes this file anew with every export -->"
TAGS = ("continual-learning", "keeplora", "lora")
FIGURES = ("leak_after_rounding", "leak", "orthogonality", "captured")


@dataclass(frozen=True)
class Story:
    """What a card tells.

    Attributes:
        method, settings: The method's name, and its settings as plain JSON values.
        tasks: How many it has learned, an open one included.
        base: The pretrained model.
        certificates: Of each closed task the worst figures, or None.
        capacity: What is protected, where the method protects a subspace.
        in_base: Tasks that the weights below the adapter hold already; 0 for the original weights.
        quantised: How many of the adapted weights were quantised while it was trained.
        training: What else is to be known of how it was trained: data, learning rate, steps.
    """

    method: str
    settings: Mapping[str, Any]
    tasks: int
    base: BaseModel
    certificates: Sequence[Mapping[str, float] | None] = ()
    capacity: Capacity | None = None
    in_base: int = 0
    quantised: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)


def model_card(
    story: Story, data: ModelCardData | None = None, *, library: str = "peft", load: str | None = None
) -> str:
    """The text of a card, its metadata in front, as the Hub reads it.

    Args:
        data: Metadata of the user's own; ours fill only what it leaves out, and join its tags.
        library: ``"peft"`` for an adapter; else of a merged model what loads it, by the line of Python ``load``.
    """
    from huggingface_hub import ModelCard, ModelCardData

    mine: Any = ModelCardData() if data is None else copy.deepcopy(data)
    adapter = library == "peft"
    title = f"{'Adapter' if adapter else 'Model'} learned by {story.method}"
    mine.library_name = mine.library_name or library
    mine.base_model = mine.base_model or (story.base.name if story.base.on_hub else None)
    mine.base_model_relation = mine.get("base_model_relation") or ("adapter" if adapter else "finetune")
    mine.tags = sorted({*(mine.tags or ()), *TAGS})
    if mine.pipeline_tag is None and story.base.task_type == "CAUSAL_LM":
        mine.pipeline_tag = "text-generation"
    results: list[EvalResult] = mine.eval_results or []
    if results:
        mine.model_name = mine.model_name or title
        mine.metrics = mine.metrics or sorted({result.metric_type for result in results})
    parts = [
        f"# {title}\n\n{MARK}",
        _what(story, adapter),
        _how(story, load),
        _base(story) if adapter else "",
        _protection(story),
        _certificates(story),
        _results(results),
        _json("Training", story.training),
        _json("Settings", story.settings),
        f"## Versions\n\nkeeplora {__version__}, torch {torch.__version__}{_peft() if adapter else ''}",
    ]
    text = f"---\n{mine.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
    return str(ModelCard(text))


def write_card(folder: Path, text: str) -> None:
    """Put a card into a folder; one that somebody else wrote there stays, which a warning says."""
    file = folder / CARD
    if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        warn(
            f"export: {file} was not written by keeplora and stays as it is: the model card was left out. Move it "
            "away to get one."
        )
        return
    write_atomic(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _what(story: Story, adapter: bool) -> str:
    tasks = f"{story.tasks} task{'s' if story.tasks != 1 else ''}"
    kind = "A LoRA adapter in PEFT's format" if adapter else "A pretrained model with all updates in its weights"
    return f"{kind}, by keeplora. It learned {tasks} by the method `{story.method}`. Base model: {_named(story.base)}."


def _named(base: BaseModel) -> str:
    if base.name is None:
        return "not named by whoever made this"
    if not base.on_hub:
        return f"`{Path(base.name).name}`, which is no id on the Hub"
    return f"`{base.name}`" + (f" at revision `{base.revision}`" if base.revision else "")


def _how(story: Story, load: str | None) -> str:
    if load is not None:
        return f"## Load\n\n```python\n{load}\n```"
    automatic = story.base.name is not None and not story.in_base
    kind = {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM"}.get(
        str(story.base.task_type), "AutoPeftModel" if story.base.auto_mapping else None
    )
    if automatic and kind is not None:
        lines = f'from peft import {kind}\n\nmodel = {kind}.from_pretrained("this folder or repository")'
    else:
        lines = (
            'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, "this folder or repository")'
        )
    return f"## Load\n\n```python\n{lines}\n```"


def _base(story: Story) -> str:
    weights = (
        f"the base model **with {story.in_base} tasks merged** into its weights, not the original one"
        if story.in_base
        else "the **original** weights of the base model"
    )
    return (
        f"## What it belongs on\n\nThis adapter belongs on {weights}. PEFT does not check that. On weights that hold "
        "the updates already they count twice. `keeplora.json` holds hashes of the right weights, and keeplora's "
        "`import_peft` checks them; weights cast to bfloat16 or float16 are known again.\n\n"
        "Keep the adapter unmerged, or merge it in float32. `merge_and_unload` into bfloat16 weights rounds, and "
        "rounding reaches directions that are protected." + _quantised(story)
    )


def _quantised(story: Story) -> str:
    if not story.quantised:
        return ""
    return (
        f"\n\n{story.quantised} of the adapted weights were quantised while it was trained. It belongs on the same "
        "quantised weights: load the base model with the quantisation it was trained with. On the weights from before "
        "they were quantised, outputs differ."
    )


def _protection(story: Story) -> str:
    if story.capacity is None:
        return (
            f"## What is protected\n\nNothing by construction: `{story.method}` gives no guarantee for what the base "
            "model or earlier tasks knew."
        )
    held = sum(layer.protected for layer in story.capacity)
    all_of = held + sum(layer.free for layer in story.capacity)
    return (
        f"## What is protected, and what is not\n\nProtected: {held} of {all_of} input directions of "
        f"{len(story.capacity)} adapted weights. Parts of inputs in them are mapped as before, up to the leak below. "
        "They are directions of the tasks' features and, where the method says so, of the pretrained weights.\n\n"
        "Not protected: everything outside of those directions. A task's update may change any output there, also for "
        "inputs that no task has shown. Weights that are not adapted did not change."
    )


def _certificates(story: Story) -> str:
    rows = [(task, figures) for task, figures in enumerate(story.certificates, 1) if figures]
    if not rows:
        return ""
    head = (
        "| task | leak of the stored weights | leak of the factors | orthogonality | captured |\n|---|---|---|---|---|"
    )
    lines = [f"| {task} | " + " | ".join(_figure(figures, name) for name in FIGURES) + " |" for task, figures in rows]
    return (
        "## Certificate\n\nThe worst layer after each task. Leak: the share ‖ΔW Q‖ / ‖ΔW‖ of a change in directions "
        "that were protected; 0 is best. The stored weights are those of the model it was trained in, merged and "
        "rounded; the factors are what this file holds.\n\n" + "\n".join([head, *lines])
    )


def _figure(figures: Mapping[str, float], name: str) -> str:
    value = figures.get(name)
    if value is None:
        return "–"
    return f"{value:.4f}" if name == "captured" else f"{value:.1e}"


def _results(results: Sequence[EvalResult]) -> str:
    if not results:
        return ""
    rows = [
        f"| {each.dataset_name} | {each.metric_name or each.metric_type} | {each.metric_value} |" for each in results
    ]
    return "## Results\n\n" + "\n".join(["| task | metric | value |\n|---|---|---|", *rows])


def _json(title: str, values: Mapping[str, Any]) -> str:
    return f"## {title}\n\n```json\n{json.dumps(dict(values), indent=2)}\n```" if values else ""


def _peft() -> str:
    import peft

    return f", peft {peft.__version__}"
